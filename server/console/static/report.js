// What was measured of an expert against its fine-tune, as facts to be listed.

import { bytes, digits, percent } from "./format.js";

/** Changed share up to which keeping every bit is proposed, as `store/probe.py` has it. */
const WORTH = 0.5;

/** Name and text of each fact; what was not measured is left out. */
export function measuredFacts(report) {
  if (!report) return [];
  const prompts = `${report.prompts} exemplars ${report.held_out ? "held out" : "that it was made from"}`;
  const scores =
    report.score !== undefined &&
    `exact match ${digits(report.score)}, fine-tune ${digits(report.fine_tune_score)}, ` +
      `base ${digits(report.base_score)}, on ${report.labelled} labelled`;
  return [
    ["Relative error", report.relative_error !== undefined && digits(report.relative_error)],
    ["KL to the fine-tune", report.kl !== undefined && `${digits(report.kl)} nats per token, on ${prompts}`],
    ["Same answers", report.agreement !== undefined && `${percent(report.agreement)} of the fine-tune's greedy ones`],
    ["Scores", scores],
  ].filter(([, value]) => value);
}

/** What a job tells beyond that: tries that were not enough, and which codec would suit the fine-tune. */
export function jobFacts({ probe, codec, unmeasured, widened }) {
  const changed = probe && percent(probe.changed);
  const kept = probe && `keeps every bit in about ${bytes(probe.bytes)}`;
  return [
    ["Not compared", unmeasured],
    ["Widened", widened?.join("; ")],
    ["Weights changed", codec === "overwrite" && changed],
    ["Lossless", codec !== "overwrite" && probe?.changed <= WORTH && `${changed} changed at all: overwrite ${kept}`],
  ].filter(([, value]) => value);
}
