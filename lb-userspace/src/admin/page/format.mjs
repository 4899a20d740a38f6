// Values as text and shapes.

import { h } from "./vendor/preact/preact.mjs";
import htm from "./vendor/htm/htm.mjs";

export const html = htm.bind(h);

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const fine = new Intl.NumberFormat("en", { maximumSignificantDigits: 2 });

/** A number with separators; a dash where there is none. */
export const count = (n) => (n == null ? "–" : whole.format(n));

/** A number of things, by a regular noun in the singular. */
export const counted = (n, noun) => `${count(n)} ${noun}${n === 1 ? "" : "s"}`;

/** Something per second. */
export const rate = (n) => (n >= 10 || n === 0 ? whole.format(n) : fine.format(n));

/** A word for a shell's command line. */
export const shellWord = (text) => (/^[\w.:@%+,=-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

/** Seconds as people say them. */
export function age(seconds) {
  if (seconds == null) return "–";
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

/** Microseconds. */
export function micros(us) {
  if (us == null) return "–";
  return us < 1000 ? `${us} µs` : `${fine.format(us / 1000)} ms`;
}

export const ports = (list) => (list === "any" ? "any port" : list.join(", "));

/** How each state looks; a state that isn't here is neutral. */
const KINDS = {
  good: ["healthy", "live", "attached", "up", "ready", "established", "sent", "translate", "announced", "passed"],
  fair: ["warning", "degraded", "unproven", "draining", "spare", "suspect", "waiting", "connecting",
    "shadow", "aborted", "not announced"],
  bad: ["down", "ejected", "unroutable", "out", "failing", "failed", "refused", "not ready", "lost",
    "detached"],
};
const kinds = new Map(Object.entries(KINDS).flatMap(([kind, all]) => all.map((state) => [state, kind])));

const SHAPES = {
  good: html`<circle cx="6" cy="6" r="4.5" />`,
  fair: html`<path d="M6 1 11.5 10.8H.5z" />`,
  bad: html`<path d="M1.5 1.5h9v9h-9z" />`,
  idle: html`<circle cx="6" cy="6" r="4" fill="none" stroke="currentColor" stroke-width="1.6" />`,
};

/** A state: its word, with a shape and a colour of its kind. */
export function State({ of }) {
  const kind = kinds.get(of) ?? "idle";
  return html`<span class="state ${kind}"><svg viewBox="0 0 12 12" aria-hidden="true">${SHAPES[kind]}</svg>${of}</span>`;
}

/** A table whose first column names its rows. */
export function Table({ caption, heads, rows, empty }) {
  if (rows.length === 0) return empty ? html`<p class="quiet">${empty}</p>` : null;
  const numeric = heads.map((head) => head.startsWith("#"));
  return html`<div class="wide" tabindex="0" role="region" aria-label=${caption}><table>
    <caption class="unseen">${caption}</caption>
    <thead><tr>${heads.map((head, at) => html`<th scope="col" class=${numeric[at] ? "n" : ""}>${head.replace("#", "")}</th>`)}</tr></thead>
    <tbody>${rows.map((row) => html`<tr>${row.map((cell, at) => at === 0
      ? html`<th scope="row">${cell}</th>`
      : html`<td class=${numeric[at] ? "n" : ""}>${cell}</td>`)}</tr>`)}</tbody>
  </table></div>`;
}

/** Names and values. */
export const Facts = ({ of }) => html`<dl class="facts">
  ${of.filter(([, value]) => value != null && value !== "").map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}
</dl>`;

/** Commands, each with what it does: the page itself changes nothing. */
export const Commands = ({ of }) => html`<section aria-labelledby="commands"><h2 id="commands">Commands</h2>
  <p class="quiet">This page changes nothing. On the node:</p>
  <dl class="commands">${of.map(([command, text]) => html`<div><dt><code>${command}</code></dt><dd>${text}</dd></div>`)}</dl>
</section>`;
