// One turn on the screen: the question, the answer as it grows, and where it came from.

import { getJson } from "./api.js";
import { open } from "./dialogs.js";
import { h, show, toast } from "./dom.js";
import { explanation, mixBar, mixChips, reasonWords } from "./explain.js";
import { digits, seconds } from "./format.js";

export class TurnView {
  /** `turn` is a part of the conversation; `question` gives the messages up to its question, for an explanation. */
  constructor(turn, messages, again) {
    this.turn = turn;
    this.messages = messages;
    this.again = again;
    this.text = h("div", { class: "text" });
    this.origin = h("div", { class: "origin" });
    this.answer = h(
      "article",
      { class: "answer", "aria-label": "Answer" },
      this.origin,
      this.text,
      (this.foot = h("div", { class: "turn-foot" })),
    );
    this.element = h(
      "li",
      { class: "turn" },
      h("article", { class: "question", "aria-label": "Question" }, turn.question),
      this.answer,
    );
    this.draw();
  }

  /** Show the turn as it is now. */
  draw() {
    const { turn } = this;
    this.answer.classList.toggle("busy", turn.state === "busy");
    show(this.text, turn.answer);
    show(this.origin, this.#origin());
    show(this.foot, this.#foot());
  }

  /** Show more of the answer's text; the rest stays. */
  grow() {
    this.text.textContent = this.turn.answer;
  }

  #origin() {
    const { turn } = this;
    if (!turn.mix) return turn.state === "busy" ? h("span", { class: "quiet" }, "Waiting for the first token …") : null;
    return [
      h(
        "div",
        { class: "chips" },
        mixChips(turn.mix),
        turn.reason && h("span", { class: "badge" }, reasonWords(turn.reason)),
      ),
      mixBar(turn.mix),
    ];
  }

  #foot() {
    const { turn } = this;
    if (turn.state === "busy") return null;
    if (turn.state === "failed") {
      return [
        h("p", { class: "notice bad", role: "alert" }, turn.error),
        this.#button("Try again", () => this.again(turn)),
      ];
    }
    const spent = [
      turn.state === "stopped" && "stopped",
      turn.finish === "length" && "cut at the limit of tokens",
      turn.tokens && `${turn.tokens} tokens`,
      turn.first && `first after ${seconds(turn.first)}`,
      turn.rate && `${digits(turn.rate, 3)} tokens/s`,
      turn.distance !== null && turn.distance !== undefined && `distance ${digits(turn.distance)}`,
    ].filter(Boolean);
    return [
      h("span", { class: "quiet" }, spent.join(" · ")),
      h(
        "span",
        { class: "row" },
        turn.routed && this.#button("Why?", () => this.#explain()),
        this.#button("Copy", () => this.#copy()),
        this.#button("Try again", () => this.again(turn)),
      ),
    ];
  }

  #button(text, onclick) {
    return h("button", { type: "button", class: "small", onclick }, text);
  }

  async #copy() {
    try {
      await navigator.clipboard.writeText(this.turn.answer);
      toast("Copied");
    } catch {
      toast("The browser does not let this page copy.", "bad");
    }
  }

  async #explain() {
    try {
      const decision = await getJson("/v1/route", {
        method: "POST",
        json: { messages: this.messages(), ...(this.turn.routing && { routing: this.turn.routing }) },
      });
      await open("Why this answer came from here", () => explanation(decision), { wide: true });
    } catch (error) {
      toast(error.message, "bad");
    }
  }
}
