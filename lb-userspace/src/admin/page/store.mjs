// What the daemon reports: the stream of `/v1/stream`, with rates and a short history of each service.

/** The points of a service's history: some three minutes. */
const MAX_POINTS = 90;

export const store = {
  /** The status document; `null` before the first. */
  status: null,
  /** Services by name, each with `rate`: connections per second in the last interval. */
  services: new Map(),
  /** Grows with every change of `services`: the version of what is derived from them. */
  version: 0,
  /** `connecting`, `live` or `lost`. */
  link: "connecting",
  isPaused: false,
};

const listeners = new Set();

/** Calls `listener` after each change. */
export function subscribe(listener) {
  listeners.add(listener);
}

function changed() {
  for (const listener of listeners) listener();
}

let source = null;
let lastEvent = 0;
let seconds = 0;
/** Times and connections per second, by service: two numbers a point. */
const history = new Map();
let active = new Set();

export function connect() {
  source?.close();
  source = new EventSource("v1/stream");
  source.addEventListener("status", (event) => {
    const now = performance.now();
    seconds = (now - lastEvent) / 1000;
    lastEvent = now;
    store.status = JSON.parse(event.data);
    store.link = "live";
    // A service that isn't in the next event has had no connections.
    for (const name of active) setRate(store.services.get(name), 0);
    active = new Set();
    changed();
  });
  source.addEventListener("services", (event) => {
    const { all, services, removed } = JSON.parse(event.data);
    const before = all ? store.services : null;
    if (all) store.services = new Map();
    for (const service of services) {
      const last = (before ?? store.services).get(service.name);
      const n = last ? service.connects - last.connects : 0;
      // A counter that began again has no rate, nor has one across a gap.
      setRate(service, !all && n > 0 ? n / seconds : 0);
      store.services.set(service.name, service);
    }
    for (const name of removed) {
      store.services.delete(name);
      history.delete(name);
    }
    store.version += 1;
    changed();
  });
  source.addEventListener("error", () => {
    store.link = "lost";
    changed();
    // The browser connects again by itself, but not after a refusal.
    if (source.readyState === EventSource.CLOSED) setTimeout(() => store.isPaused || connect(), 3000);
  });
}

/** Ends the stream, or begins it again. */
export function pause(isPaused) {
  store.isPaused = isPaused;
  if (isPaused) source?.close();
  else connect();
  changed();
}

function setRate(service, rate) {
  if (!service) return;
  service.rate = rate;
  const points = history.get(service.name) ?? [];
  if (rate === 0 && (points.length === 0 || points.at(-1) === 0)) return;
  if (rate > 0) active.add(service.name);
  points.push(lastEvent, rate);
  if (points.length > 2 * MAX_POINTS) points.splice(0, 2);
  history.set(service.name, points);
}

/** The history of a service: times in milliseconds and rates, in turn. */
export function historyOf(name) {
  return history.get(name) ?? [];
}

/** A document of `/v1`; throws the server's text where there is none. */
export async function get(path) {
  const answer = await fetch(path);
  const isJson = answer.headers.get("content-type")?.startsWith("application/json");
  if (isJson) return answer.json();
  throw new Error((await answer.text()).trim() || answer.statusText);
}
