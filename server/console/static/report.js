// What was measured of an expert against its fine-tune, as facts to be listed.

import { digits, percent } from "./format.js";

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
