// The list of all services: only the rows in sight are in the document.

import { Component } from "./vendor/preact/preact.mjs";
import { count, counted, html, ports, rate, State } from "./format.mjs";
import { store } from "./store.mjs";

/** The height of a row in pixels, as in page.css. */
const ROW = 36;
/** Rows above and below what is in sight. */
const MARGIN = 12;

const ORDER = ["down", "degraded", "cold", "healthy"];

const COLUMNS = [
  { key: "name", label: "Service", of: (it) => it.name },
  { key: "state", label: "State", of: (it) => ORDER.indexOf(it.condition) },
  { key: "vip", label: "VIP and ports", of: (it) => it.vip.split(".").reduce((all, octet) => all * 256 + +octet, 0) },
  { key: "reached", label: "Instances", n: true, of: (it) => it.reached },
  { key: "rate", label: "Connects/s", n: true, of: (it) => it.rate },
  { key: "flight", label: "In flight", n: true, of: (it) => it.in_flight ?? 0 },
  { key: "failed", label: "Failed", n: true, of: (it) => it.failed },
  { key: "refused", label: "Refused", n: true, of: (it) => it.refused },
];

/** The filters by state, as the address has them. */
export const STATES = { "": "all", broken: "only what is broken", down: "down", degraded: "degraded", healthy: "healthy", cold: "cold" };

let kept = { key: null, list: [] };

/** The services that the address asks for, in its order. */
export function select(query) {
  // An address may have been typed.
  const state = Object.hasOwn(STATES, query.state) ? query.state : "";
  const key = [store.version, query.q, state, query.sort].join("\n");
  if (kept.key === key) return kept.list;
  const words = query.q.toLowerCase().split(/\s+/).filter(Boolean);
  const isWanted = (it) =>
    (state === "" ||
      it.condition === state ||
      (state === "broken" && (it.condition === "down" || it.condition === "degraded"))) &&
    words.every((word) => {
      const [not, text] = word.startsWith("-") && word.length > 1 ? [true, word.slice(1)] : [false, word];
      return not !== (it.name.toLowerCase().includes(text) || it.vip.includes(text));
    });
  const descends = query.sort.startsWith("-");
  const column = COLUMNS.find(({ key }) => key === query.sort.replace("-", "")) ?? COLUMNS[0];
  const sign = descends ? -1 : 1;
  const keyed = [...store.services.values()].filter(isWanted).map((it) => [column.of(it), it]);
  keyed.sort(([one, a], [other, b]) => {
    if (one !== other) return one < other ? -sign : sign;
    return a.name < b.name ? -1 : 1;
  });
  const list = keyed.map(([, it]) => it);
  kept = { key, list };
  return list;
}

export class Services extends Component {
  state = { top: 0, height: 600 };
  focus = null;

  componentDidMount() {
    this.measure = () => this.scroller && this.setState({ height: this.scroller.clientHeight });
    addEventListener("resize", this.measure);
    this.measure();
  }

  componentWillUnmount() {
    removeEventListener("resize", this.measure);
  }

  componentDidUpdate(last) {
    const { q, state, sort } = this.props.query;
    if (this.scroller && (last.query.q !== q || last.query.state !== state || last.query.sort !== sort)) {
      this.scroller.scrollTop = 0;
    }
    if (this.focus !== null) {
      const link = this.scroller.querySelector(`a[data-row="${this.focus}"]`);
      this.focus = null;
      link?.focus({ preventScroll: true });
    }
  }

  onKeyDown = (event) => {
    const row = event.target.closest?.("a[data-row]");
    const n = select(this.props.query).length;
    const page = Math.max(1, Math.floor(this.state.height / ROW) - 2);
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -n, End: n }[event.key];
    if (!step || n === 0 || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const from = row ? +row.dataset.row : step > 0 ? -1 : 0;
    const to = Math.min(n - 1, Math.max(0, from + step));
    const { scrollTop, clientHeight } = this.scroller;
    // Below the heading, which stays.
    const [top, bottom] = [to * ROW, (to + 2) * ROW];
    if (top < scrollTop) this.scroller.scrollTop = top;
    else if (bottom > scrollTop + clientHeight) this.scroller.scrollTop = bottom - clientHeight;
    this.focus = to;
    this.setState({ top: this.scroller.scrollTop });
  };

  render({ query, go }) {
    const list = select(query);
    const first = Math.max(0, Math.floor(this.state.top / ROW) - MARGIN);
    const end = Math.min(list.length, Math.ceil((this.state.top + this.state.height) / ROW) + MARGIN);
    const spacer = (rows) => rows > 0 && html`<tr aria-hidden="true" class="spacer"><td style=${{ height: `${rows * ROW}px` }}></td></tr>`;
    const sortBy = ({ key, n }) => {
      if (query.sort === key) return `-${key}`;
      return query.sort === `-${key}` || !n ? key : `-${key}`;
    };
    const sorted = ({ key }) => (query.sort === key ? "ascending" : query.sort === `-${key}` ? "descending" : null);
    return html`
      <h1 tabindex="-1">Services</h1>
      <form class="filters" role="search" onSubmit=${(event) => event.preventDefault()}>
        <label>Search <input type="search" name="q" value=${query.q} placeholder="name or VIP; -word leaves out"
          autocomplete="off" spellcheck="false" onInput=${(event) => go({ q: event.target.value }, true)} /></label>
        <label>Show <select name="state" onChange=${(event) => go({ state: event.target.value }, true)}>
          ${Object.entries(STATES).map(([value, text]) => html`<option value=${value} selected=${value === query.state}>${text}</option>`)}
        </select></label>
        <p class="quiet" id="n-services">${count(list.length)} of ${counted(store.services.size, "service")}</p>
      </form>
      <div class="scroller" ref=${(it) => (this.scroller = it)} tabindex="0" role="region" aria-label="Services, a table; arrow keys move between its rows"
        onScroll=${(event) => this.setState({ top: event.target.scrollTop })} onKeyDown=${this.onKeyDown}>
        <table class="services" aria-rowcount=${list.length + 1}>
          <caption class="unseen">Services</caption>
          <thead><tr aria-rowindex="1">${COLUMNS.map((column) => html`<th scope="col" class="c-${column.key} ${column.n ? "n" : ""}" aria-sort=${sorted(column)}>
            <button type="button" onClick=${() => go({ sort: sortBy(column) }, true)}>${column.label}<span aria-hidden="true" class="arrow">${{ ascending: "↑", descending: "↓" }[sorted(column)] ?? ""}</span></button></th>`)}</tr></thead>
          <tbody>
            ${spacer(first)}
            ${list.slice(first, end).map((it, at) => html`<tr key=${it.name} aria-rowindex=${first + at + 2}>
              <th scope="row"><a href="?view=service&name=${encodeURIComponent(it.name)}" data-row=${first + at}>${it.name}</a></th>
              <td class="c-state"><${State} of=${it.condition} /></td>
              <td class="c-vip"><code>${it.vip}</code> <span class="quiet">${ports(it.ports)}</span></td>
              <td class="c-reached n">${it.reached === it.instances ? count(it.reached) : html`${count(it.reached)} of ${count(it.instances)}`}</td>
              <td class="c-rate n">${rate(it.rate)}</td>
              <td class="c-flight n">${count(it.in_flight)}</td>
              <td class="c-failed n ${it.failed > 0 ? "some" : ""}">${count(it.failed)}</td>
              <td class="c-refused n ${it.refused > 0 ? "some" : ""}">${count(it.refused)}</td>
            </tr>`)}
            ${spacer(list.length - end)}
          </tbody>
        </table>
        ${list.length === 0 && html`<p class="nothing">${store.services.size === 0 ? "No service is routed yet: give one the tag, and it appears here." : "No service matches. Clear the search, or show all."}</p>`}
      </div>
      <p class="quiet hint">Counts of failed and refused connects are since the daemon's start.</p>`;
  }
}
