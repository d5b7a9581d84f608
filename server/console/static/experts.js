// What the server has: its base and its experts, loaded once and shared by the views.

import { getJson } from "./api.js";

const PAGES = 20;
const COLOURS = 12;

export const server = { base: "", version: "" };

let experts = [];
let loaded = false;
const listeners = new Set();

/** The experts as they were loaded last, by name. */
export const all = () => experts;

/** Whether they have been loaded at all. */
export const areLoaded = () => loaded;

/** Be told whenever they have been loaded. */
export const subscribe = (listener) => listeners.add(listener);

/** Load base and experts anew. */
export async function load(how = {}) {
  const told = await getJson("/version", how);
  server.base = told.base;
  server.version = told.version;
  const found = [];
  let after = "";
  for (let page = 0; page < PAGES; page += 1) {
    const list = await getJson(`/v1/experts?limit=1000&after=${encodeURIComponent(after)}`, how);
    found.push(...list.data);
    if (!list.has_more) break;
    after = list.data.at(-1).id;
  }
  experts = found;
  loaded = true;
  for (const listener of listeners) listener(experts);
  return experts;
}

/** The colour of an expert, the same in every view; grey for the base and for what is not here. */
export function colour(name) {
  const place = experts.findIndex((expert) => expert.id === name);
  return place < 0 ? "var(--grey)" : `var(--c${place % COLOURS})`;
}

/** Retention as its file's report has it, or as whoever made the expert says. Null if not told. */
export function retention(expert) {
  if (expert.report?.retention !== undefined) return expert.report.retention;
  const told = Number.parseFloat(expert.metadata?.retention);
  return Number.isFinite(told) ? told : null;
}
