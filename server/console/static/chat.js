// The playground: a conversation that streams, with who answered beside every answer.

import { ApiError, call, events, getJson } from "./api.js";
import { TurnView } from "./answer.js";
import { h, show, toast } from "./dom.js";
import { all, subscribe } from "./experts.js";
import { keep, recall } from "./kept.js";
import { Mixer } from "./mixer.js";
import { Sampling } from "./sampling.js";

const ANYTHING = "What is the tallest mountain in Africa?";
const STARTERS = 3;

export function chatView(root) {
  const view = new Chat(root);
  return {
    title: "Chat",
    start: ([expert]) => view.start(expert),
    escape: () => view.stop(),
    focus: () => view.input.focus(),
  };
}

class Chat {
  constructor(root) {
    this.turns = recall("turns", []).map((turn) => (turn.state === "busy" ? { ...turn, state: "stopped" } : turn));
    this.mixer = new Mixer();
    this.sampling = new Sampling();
    this.list = h("ol", { class: "turns", "aria-label": "Conversation" });
    this.log = h("div", { class: "log", tabindex: "0", role: "region", "aria-label": "Conversation" }, this.list);
    this.input = h("textarea", {
      id: "message",
      rows: 2,
      placeholder: "Ask something …",
      "aria-label": "Message",
      onkeydown: (event) => {
        if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
          event.preventDefault();
          this.send();
        }
      },
    });
    this.button = h("button", { type: "submit", class: "primary", id: "send" }, "Send");
    this.form = h(
      "form",
      {
        class: "composer",
        onsubmit: (event) => {
          event.preventDefault();
          if (this.running) this.stop();
          else this.send();
        },
      },
      this.input,
      this.button,
    );
    const head = h(
      "div",
      { class: "view-head" },
      h("h1", { id: "title-chat" }, "Chat"),
      h("button", { type: "button", class: "small", id: "new-chat", onclick: () => this.clear() }, "New conversation"),
    );
    show(
      root,
      head,
      h(
        "div",
        { class: "chat" },
        h("div", { class: "talk" }, this.log, this.form),
        h(
          "aside",
          { class: "settings", "aria-label": "Settings of the answer" },
          this.mixer.element,
          this.sampling.element,
        ),
      ),
    );
    this.running = null;
    subscribe(() => !this.turns.length && this.#offer());
    this.#draw();
  }

  start(expert) {
    if (expert) {
      this.mixer.force(expert);
      history.replaceState(null, "", "#chat");
    }
    this.log.scrollTop = this.log.scrollHeight;
  }

  clear() {
    this.stop();
    this.turns = [];
    this.#draw();
    this.input.focus();
  }

  stop() {
    this.running?.abort();
  }

  /** Ask what is in the field. */
  send() {
    const question = this.input.value.trim();
    if (!question || this.running) return;
    if (this.mixer.gap) {
      toast(this.mixer.gap, "bad");
      return;
    }
    this.input.value = "";
    this.#ask(question);
  }

  /** Ask a turn's question anew, as the settings are now; what came after it is let go. */
  again(turn) {
    if (this.running) return;
    this.turns = this.turns.slice(0, this.turns.indexOf(turn));
    this.#draw();
    this.#ask(turn.question);
  }

  async #ask(question) {
    const turn = { question, answer: "", state: "busy", mix: null, reason: null, alone: this.sampling.alone };
    this.turns.push(turn);
    this.#draw();
    this.log.scrollTop = this.log.scrollHeight;
    this.running = new AbortController();
    this.button.textContent = "Stop";
    try {
      await this.#stream(turn, this.views.at(-1));
      turn.state = "done";
    } catch (error) {
      turn.state = error.name === "AbortError" ? "stopped" : "failed";
      turn.error = error.message;
      if (!(error instanceof ApiError) && error.name !== "AbortError") throw error;
    } finally {
      this.running = null;
      this.button.textContent = "Send";
      // By the turn, not by the place: the conversation may have been cleared meanwhile.
      this.views.find((view) => view.turn === turn)?.draw();
      this.#keep();
      this.#follow();
    }
  }

  async #stream(turn, view) {
    const who = this.mixer.request();
    turn.routed = who.model === "auto";
    turn.routing = who.routing ?? null;
    const began = performance.now();
    const response = await call("/v1/chat/completions", {
      method: "POST",
      signal: this.running.signal,
      json: {
        ...who,
        ...this.sampling.request(),
        messages: this.#messages(turn),
        stream: true,
        stream_options: { include_usage: true },
      },
    });
    turn.mix = parseMix(response.headers.get("x-switchyard-mix"));
    let first = null;
    for await (const chunk of events(response)) {
      const [choice] = chunk.choices;
      if (choice?.delta.content) {
        first ??= performance.now();
        turn.answer += choice.delta.content;
        if (turn.first === undefined) {
          turn.first = (first - began) / 1000;
          view.draw();
        } else view.grow();
        this.#follow();
      }
      if (choice?.finish_reason) turn.finish = choice.finish_reason;
      if (chunk.usage) this.#account(turn, chunk.usage, first);
    }
  }

  #account(turn, usage, first) {
    turn.tokens = usage.completion_tokens;
    turn.mix = usage.switchyard.mix;
    turn.reason = usage.switchyard.reason;
    turn.distance = usage.switchyard.distance;
    const elapsed = (performance.now() - (first ?? performance.now())) / 1000;
    if (elapsed > 0 && turn.tokens > 1) turn.rate = (turn.tokens - 1) / elapsed;
  }

  /** What the server is told of the conversation up to the question of a turn. Turns without an answer are left out. */
  #messages(turn) {
    const before = turn.alone ? [] : this.turns.slice(0, this.turns.indexOf(turn)).filter((one) => one.answer);
    const said = before.flatMap((one) => [
      { role: "user", content: one.question },
      { role: "assistant", content: one.answer },
    ]);
    const system = this.sampling.system.trim();
    return [
      ...(system ? [{ role: "system", content: system }] : []),
      ...said,
      { role: "user", content: turn.question },
    ];
  }

  #draw() {
    this.views = this.turns.map(
      (turn) =>
        new TurnView(
          turn,
          () => this.#messages(turn),
          (one) => this.again(one),
        ),
    );
    show(
      this.list,
      this.views.map((view) => view.element),
    );
    if (!this.turns.length) {
      show(this.list, this.#welcome());
      this.#offer();
    }
    this.#keep();
  }

  #welcome() {
    return h(
      "li",
      { class: "welcome" },
      h("h2", {}, "One base, many experts"),
      h("p", {}, "Ask anything. Every answer shows which experts gave it, with which weights, and why."),
      (this.starters = h("div", { class: "starters" })),
    );
  }

  /** Offer prompts that experts are for, where this key may read them, and one that none is for. */
  async #offer() {
    const taught = all()
      .filter((expert) => expert.exemplar_count)
      .slice(0, STARTERS);
    const asked = taught.map((expert) =>
      getJson(`/v1/experts/${encodeURIComponent(expert.id)}/exemplars`, { quiet: true }),
    );
    const told = await Promise.allSettled(asked);
    const prompts = told.flatMap(({ value }) => value?.exemplars.slice(0, 1) ?? []);
    show(
      this.starters,
      [...prompts, ANYTHING].map((text) =>
        h(
          "button",
          {
            type: "button",
            onclick: () => {
              this.input.value = text;
              this.send();
            },
          },
          text,
        ),
      ),
    );
  }

  /** Stay at the end while the reader is there. */
  #follow() {
    const { scrollTop, scrollHeight, clientHeight } = this.log;
    if (scrollHeight - scrollTop - clientHeight < 120) this.log.scrollTop = scrollHeight;
  }

  #keep() {
    keep("turns", this.turns);
  }
}

/** `name=0.8,name2=-0.2` or `base`, as the header tells it before the first token. */
function parseMix(header) {
  if (!header || header === "base") return [];
  return header.split(",").map((part) => {
    const [id, value] = part.split("=");
    return { id, weight: Number(value) };
  });
}
