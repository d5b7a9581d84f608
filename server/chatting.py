"""The interactive chat of the command line."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from server.client import Client, ServerError


def converse(
    client: Client, out: Console, model: str, system: str | None, *, temperature: float, max_tokens: int
) -> None:
    """Read prompts and stream answers until end of input. Ctrl-C stops the answer in progress, not the chat."""
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    out.print(f"[dim]talking to {escape(model)}; /new starts over, /model NAME changes the model, Ctrl-D ends[/]")
    while True:
        try:
            line = out.input("[bold cyan]>[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            out.print()
            return
        if line == "/new":
            messages = list(opening)
        elif line.startswith("/model "):
            model = line.removeprefix("/model ").strip()
        elif line:
            messages.append({"role": "user", "content": line})
            answer = _answer(client, out, model, messages, temperature=temperature, max_tokens=max_tokens)
            if answer is None:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})


def _answer(
    client: Client, out: Console, model: str, messages: list[dict[str, str]], *, temperature: float, max_tokens: int
) -> str | None:
    turn = client.chat(messages, model=model, temperature=temperature, max_tokens=max_tokens)
    answer = ""
    try:
        for piece in turn:
            answer += piece
            out.print(piece, end="", markup=False, highlight=False)
    except ServerError as error:
        out.print(f"[bold red]error:[/] {escape(error.message)}")
        return None
    except KeyboardInterrupt:
        out.print(" [dim](stopped)[/]", end="")
    out.print(f"\n[dim]{escape(turn.mix)}, {turn.usage.get('completion_tokens', '?')} tokens[/]")
    return answer
