// The official `openai` client for Node.js: one function per feature, named as in features.py.
import assert from "node:assert/strict";
import OpenAI from "openai";

const target = JSON.parse(process.argv[2]);
const only = process.argv.slice(3);
const QUESTION = "the river 77 is long";
const MESSAGES = [{ role: "user", content: QUESTION }];
const TRIP = {
  type: "object",
  properties: { city: { enum: ["Rome", "Oslo"] }, days: { type: "integer", minimum: 1, maximum: 9 } },
  required: ["city", "days"],
  additionalProperties: false,
};
const TOOLS = [{ type: "function", function: { name: "plan", description: "Plan a trip.", parameters: TRIP } }];

const client = (url = target.url, apiKey = target.key) =>
  new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0, timeout: 120_000 });
const chat = (how = {}) =>
  client().chat.completions.create({ model: target.base, messages: MESSAGES, temperature: 0, max_tokens: 12, ...how });
const complete = (prompt, how = {}) =>
  client().completions.create({ model: target.base, prompt, temperature: 0, max_tokens: 8, ...how });
const text = async (how) => (await chat(how)).choices[0].message.content;

async function all(stream) {
  const chunks = [];
  for await (const chunk of await stream) chunks.push(chunk);
  return chunks;
}

async function get(path, body) {
  const answer = await fetch(target.url + path, {
    method: body ? "POST" : "GET",
    headers: { authorization: `Bearer ${target.key}`, "content-type": "application/json" },
    body: body && JSON.stringify(body),
  });
  return answer.text();
}

async function gone() {
  const found = /^switchyard_failures_total\{code="client_disconnected"\} (\S+)/m.exec(await get("/metrics"));
  return found ? Number(found[1]) : 0;
}

function checkTrip(written) {
  const trip = JSON.parse(written);
  assert.deepEqual(Object.keys(trip).sort(), ["city", "days"]);
  assert.ok(["Rome", "Oslo"].includes(trip.city) && trip.days >= 1 && trip.days <= 9, written);
}

const refused = (param, ask) =>
  assert.rejects(ask, (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError, String(error));
    assert.deepEqual([error.code, error.param], ["unsupported_parameter", param]);
    return true;
  });

const checks = {
  async example() {
    await import("./example.mjs");
  },
  async models() {
    const ids = (await all(client().models.list())).map((model) => model.id);
    for (const id of [target.base, "auto", ...target.experts]) assert.ok(ids.includes(id), id);
    assert.equal((await client().models.retrieve(target.experts[0])).id, target.experts[0]);
  },
  async chat() {
    const answer = await chat();
    assert.ok(answer.choices[0].message.content);
    assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
  },
  async chat_stream() {
    const chunks = await all(chat({ stream: true }));
    assert.equal(chunks.map((chunk) => chunk.choices[0].delta.content ?? "").join(""), await text());
    assert.ok(["stop", "length"].includes(chunks.at(-1).choices[0].finish_reason));
  },
  async stream_usage() {
    const chunks = await all(chat({ stream: true, stream_options: { include_usage: true } }));
    assert.equal(chunks.at(-1).usage.completion_tokens, (await chat()).usage.completion_tokens);
  },
  async chat_logprobs() {
    const choice = (await chat({ logprobs: true, top_logprobs: 3 })).choices[0];
    for (const token of choice.logprobs.content) {
      assert.equal(token.top_logprobs.length, 3);
      assert.equal(token.top_logprobs[0].logprob, token.logprob);
    }
    const bytes = Buffer.from(choice.logprobs.content.flatMap((token) => token.bytes));
    assert.ok(bytes.toString().startsWith(choice.message.content));
  },
  async several() {
    const { choices } = await chat({ n: 3, temperature: 1, seed: 1 });
    assert.deepEqual(choices.map((choice) => choice.index), [0, 1, 2]);
    assert.ok(new Set(choices.map((choice) => choice.message.content)).size > 1);
  },
  async stop() {
    const whole = await text({ max_tokens: 24 });
    const word = whole.slice(3, 6);
    const choice = (await chat({ max_tokens: 24, stop: [word, "never said"] })).choices[0];
    assert.equal(choice.message.content, whole.split(word)[0]);
    assert.equal(choice.finish_reason, "stop");
  },
  async seed() {
    const [one, same, other] = [
      await text({ temperature: 1, max_tokens: 24, seed: 7 }),
      await text({ temperature: 1, max_tokens: 24, seed: 7 }),
      await text({ temperature: 1, max_tokens: 24, seed: 8 }),
    ];
    assert.equal(one, same);
    assert.notEqual(one, other);
  },
  async penalties() {
    const how = { max_tokens: 40, logit_bias: { [target.letter_token]: 20 } };
    const count = async (more) => (await text({ ...how, ...more })).split(target.letter).length;
    assert.ok((await count({ frequency_penalty: 2, presence_penalty: 2 })) < (await count({})));
  },
  async logit_bias() {
    const bias = { [target.letter_token]: 100 };
    assert.equal(await text({ max_tokens: 4, logit_bias: bias }), target.letter.repeat(4));
  },
  async json_object() {
    const bias = { [target.brace_token]: 100 };
    assert.equal(await text({ response_format: { type: "json_object" }, logit_bias: bias }), "{}");
  },
  async json_schema() {
    const json_schema = { name: "trip", schema: TRIP, strict: true };
    const answer = await client().chat.completions.parse({
      model: target.base,
      messages: MESSAGES,
      temperature: 0,
      max_tokens: 600,
      response_format: { type: "json_schema", json_schema },
    });
    checkTrip(answer.choices[0].message.content);
  },
  async tools() {
    const { message } = (await chat({ max_tokens: 600, tools: TOOLS, tool_choice: "required" })).choices[0];
    const [call] = message.tool_calls;
    assert.equal(call.function.name, "plan");
    checkTrip(call.function.arguments);
    const messages = [...MESSAGES, message, { role: "tool", tool_call_id: call.id, content: "booked" }];
    const how = { tools: TOOLS, tool_choice: "none", max_tokens: 4, logit_bias: { [target.letter_token]: 100 } };
    assert.equal(await text({ messages, ...how }), target.letter.repeat(4));
  },
  async tools_stream() {
    const stream = client().chat.completions.stream({
      model: target.base,
      messages: MESSAGES,
      temperature: 0,
      max_tokens: 600,
      tools: TOOLS,
      tool_choice: { type: "function", function: { name: "plan" } },
    });
    const [call] = (await stream.finalMessage()).tool_calls;
    assert.equal(call.function.name, "plan");
    checkTrip(call.function.arguments);
  },
  async experts() {
    const [one, other] = target.experts;
    const answer = await chat({ model: "auto", experts: [{ id: one, weight: 0.75 }, { id: other, weight: -0.25 }] });
    const mix = Object.fromEntries(answer.usage.switchyard.mix.map((part) => [part.id, part.weight]));
    assert.deepEqual(mix, { [one]: 0.75, [other]: -0.25 });
  },
  async auto() {
    const [content, mix] = target.routed;
    const { response } = await chat({ model: "auto", messages: [{ role: "user", content }] }).withResponse();
    assert.equal(response.headers.get("x-switchyard-mix"), mix);
  },
  async completions() {
    const answer = await complete([QUESTION, "add 4"], { n: 2 });
    assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1, 2, 3]);
    assert.equal(answer.choices[0].text, (await complete(QUESTION)).choices[0].text);
  },
  async completions_stream() {
    const chunks = await all(complete(QUESTION, { stream: true }));
    const streamed = chunks.map((chunk) => chunk.choices[0].text).join("");
    assert.equal(streamed, (await complete(QUESTION)).choices[0].text);
  },
  async echo() {
    const choice = (await complete(QUESTION, { echo: true, logprobs: 1, max_tokens: 1 })).choices[0];
    assert.ok(choice.text.startsWith(QUESTION));
    const [first, ...others] = choice.logprobs.token_logprobs;
    assert.equal(first, null);
    assert.equal(others.length, choice.logprobs.tokens.length - 1);
    assert.ok(others.every((logprob) => logprob <= 0));
  },
  async token_prompts() {
    const { tokens } = JSON.parse(await get("/tokenize", { prompt: QUESTION }));
    const alone = (await complete(QUESTION)).choices[0].text;
    assert.equal((await complete(tokens)).choices[0].text, alone);
    const several = await complete([tokens, tokens]);
    assert.deepEqual(several.choices.map((choice) => choice.text), [alone, alone]);
  },
  async embeddings() {
    const ask = (how) => client().embeddings.create({ model: target.base, input: [QUESTION, "add 4"], ...how });
    const [packed, plain] = [(await ask({})).data, (await ask({ encoding_format: "float" })).data];
    assert.equal(packed.length, 2);
    packed[0].embedding.forEach((value, i) => assert.ok(Math.abs(value - plain[0].embedding[i]) < 1e-5));
  },
  async cancel() {
    const before = await gone();
    for (let attempt = 0; attempt < 5; attempt++) {
      const stream = await chat({ stream: true, max_tokens: target.context - 200, ignore_eos: true });
      for await (const _ of stream) break; // leaving the loop gives the stream up
      for (const deadline = Date.now() + 30_000; Date.now() < deadline; ) {
        if ((await gone()) > before) return;
        await new Promise((resolve) => setTimeout(resolve, 50));
      }
    }
    assert.fail("the server went on with an answer that nobody reads");
  },
  async auth() {
    const wrong = () => client(target.url, "wrong").models.list();
    await assert.rejects(wrong, (error) => error instanceof OpenAI.AuthenticationError && error.code === "invalid_api_key");
  },
  async unknown_model() {
    const ask = () => chat({ model: "nobody" });
    await assert.rejects(ask, (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found");
  },
  async context_length() {
    const ask = () => complete("x ".repeat(2 * target.context));
    await assert.rejects(
      ask,
      (error) => error instanceof OpenAI.BadRequestError && error.code === "context_length_exceeded",
    );
  },
  async broken_stream() {
    let seen = 0;
    const ask = async () => {
      const how = { model: target.failing_model, messages: MESSAGES, stream: true };
      for await (const _ of await client(target.failing).chat.completions.create(how)) seen++;
    };
    await assert.rejects(ask, (error) => error instanceof OpenAI.APIError && error.code === "engine_dead");
    assert.ok(seen);
  },
  best_of: () => refused("best_of", () => complete(QUESTION, { best_of: 3 })),
  suffix: () => refused("suffix", () => complete(QUESTION, { suffix: "end" })),
  async images() {
    const content = [{ type: "image_url", image_url: { url: "data:image/png;base64,AAAA" } }];
    await refused("messages[0].content[0].type", () => chat({ messages: [{ role: "user", content }] }));
  },
  async unknown() {
    await assert.rejects(chat({ best: 1 }), (error) => error.code === "unknown_parameter" && error.param === "best");
  },
  async responses() {
    const ask = () => client().responses.create({ model: target.base, input: QUESTION });
    await assert.rejects(ask, (error) => error instanceof OpenAI.NotFoundError && error.code === "not_found");
  },
};

for (const [feature, check] of Object.entries(checks)) {
  if (only.length && !only.includes(feature)) continue;
  let error = null;
  try {
    await check();
  } catch (raised) {
    console.error(raised);
    error = String(raised).split("\n")[0].slice(0, 300);
  }
  console.log(`\n${JSON.stringify({ feature, error })}`);
}
