"""ha_intent: what somebody says to a smart home to the name of the intent (42 intents).

The utterances are sampled from Home Assistant's sentence templates: `(a|b)` is a choice, `(a;b)` both in any
order, `[x]` optional, `<rule>` a named template, `{list:slot}` a value.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from examples.fetch import HOME_ASSISTANT_INTENTS, fetch, read_member
from examples.tasks.task import Row, Task

MEMBER = "home_assistant_intents/data/en.json"
PER_INTENT = 110
TRIES = 600

# Values of the slots that a household fills in itself.
HOUSEHOLD: dict[str, tuple[str, ...]] = {
    "area": ("kitchen", "bedroom", "living room", "bathroom", "garage", "office", "hallway", "garden"),
    "floor": ("ground floor", "first floor", "basement", "attic"),
    "zone": ("home", "work", "school"),
    "message": ("dinner is ready", "time to leave", "the guests are here", "please come downstairs"),
    "search_query": ("abbey road", "the beatles", "some jazz", "star wars", "the daily news", "queen"),
    "timer_name": ("pizza", "laundry", "tea", "homework", "egg"),
    "timer_command": ("turn off the lights", "open the garage door", "lock the front door"),
    "shopping_list_item": ("milk", "apples", "bread", "toothpaste", "coffee beans"),
    "todo_list_item": ("call the bank", "water the plants", "clean the oven", "pay the rent"),
}
# What {name} stands for depends on the intent: one pauses a speaker, not a lamp. The first prefix that fits.
NAMES: dict[str, tuple[str, ...]] = {
    "HassList": ("shopping list", "holiday list", "packing list", "weekend list"),
    "HassMedia": ("tv", "radio", "bedroom speaker", "sound bar"),
    "HassSetVolume": ("tv", "radio", "bedroom speaker", "sound bar"),
    "HassVacuum": ("rosie", "robot vacuum", "hoover"),
    "HassLawnMower": ("mower", "lawn robot", "goat"),
    "HassFan": ("ceiling fan", "desk fan", "extractor"),
    "HassClimate": ("thermostat", "heater", "air conditioner"),
    "HassGetWeather": ("london", "home", "the cottage"),
    "HassLight": ("desk lamp", "ceiling light", "floor lamp"),
    "": ("desk lamp", "ceiling fan", "tv", "front door", "coffee machine", "heater", "left blind", "radio"),
}
TOKEN = re.compile(r"[()\[\]|;]|<[^>]+>|\{[^}]+\}|[^()\[\]|;<{]+")


class Sampler:
    """Draws sentences from templates; `grammar` is the parsed `en.json`, `names` are the values of {name}."""

    def __init__(self, grammar: Mapping[str, Any], names: Sequence[str], rng: random.Random) -> None:
        self._names = names
        self._rules: Mapping[str, str] = grammar["expansion_rules"]
        self._lists: Mapping[str, Any] = grammar["lists"]
        self._rng = rng

    def sentence(self, template: str) -> str:
        """One sentence of `template`, single spaces. Raises ValueError if its brackets do not match."""
        tokens = TOKEN.findall(template)[::-1]
        text = self._alternatives(tokens, "")
        if tokens:
            raise ValueError(f"unbalanced template: {template}")
        return " ".join(text.split())

    def _alternatives(self, tokens: list[str], closing: str) -> str:
        """Consume up to `closing` ("" = the end); every branch is drawn, then one (or, after `;`, all) is kept."""
        branches, permute = [""], False
        while tokens:
            token = tokens.pop()
            if token == closing:
                break
            if token in "|;":
                permute = permute or token == ";"
                branches.append("")
            else:
                branches[-1] += self._draw(token, tokens)
        if permute:
            self._rng.shuffle(branches)
            return " ".join(branches)
        return self._rng.choice(branches)

    def _draw(self, token: str, tokens: list[str]) -> str:
        if token == "(":
            return self._alternatives(tokens, ")")
        if token == "[":
            text = self._alternatives(tokens, "]")
            return text if self._rng.random() < 0.5 else ""
        if token[0] == "<":
            return self.sentence(self._rules[token[1:-1]])
        if token[0] == "{":
            return self._value(token[1:-1].split(":")[0])
        return token

    def _value(self, name: str) -> str:
        own = self._names if name == "name" else HOUSEHOLD.get(name)
        if own is not None:
            return self._rng.choice(own)
        values = self._lists[name]
        if "range" in values:
            span = values["range"]
            return str(self._rng.randrange(span["from"], span["to"] + 1, span.get("step", 1)))
        item = self._rng.choice(values["values"])
        return self.sentence(item if isinstance(item, str) else item["in"])


def rows() -> Iterator[Row]:
    """Up to PER_INTENT different utterances for every intent; intents with few sentences give fewer."""
    grammar = json.loads(read_member(fetch(HOME_ASSISTANT_INTENTS), MEMBER))
    rng = random.Random(0)
    for intent, body in sorted(grammar["intents"].items()):
        names = next(values for prefix, values in NAMES.items() if intent.startswith(prefix))
        sampler = Sampler(grammar, names, rng)
        groups: Sequence[Sequence[str]] = [block["sentences"] for block in body["data"]]
        found: set[str] = set()
        for _ in range(TRIES):
            if len(found) < PER_INTENT:
                found.add(sampler.sentence(rng.choice(rng.choice(groups))))
        for utterance in sorted(found):
            yield Row(prompt=f"Which smart home intent is this? {utterance}", answer=intent)


TASK = Task(
    name="ha_intent",
    summary="utterance to the name of a smart home intent (42 intents)",
    build=rows,
    hint="Answer only with the Home Assistant intent name, such as HassTurnOn or HassGetState.",
)
