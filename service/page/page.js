// The page of the service: asks its routes, and writes what they answer. No text ever becomes HTML.

const BUDGET_S = 0.03;
// Whoever looks wants to see a late answer, too, and not that it was refused.
const DEADLINE_MS = "1000";
const POLL_MS = 2000;
const AGAIN_MS = 1000;
const SHOWN_LATENCIES = 60;
const SHOWN_BEHAVIORS = 12;
const MAX_CANDIDATES = 20;
const SVG = "http://www.w3.org/2000/svg";
// Behind JSON.parse, ids above 2^53 - 1 would be others: they stay the text that they are.
const IDS = /("item_id":\s*)(\d{16,})/g;

const state = {
  user: null, models: [], first: null, latencies: [], scored: null, chosen: null, titles: new Map(), seesMetrics: true,
};
const $ = (id) => document.getElementById(id);

class Problem extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

const UNKNOWN = 401;
const NOT_READY = 503;
// Without a key that may see it, or where another port shows it.
const UNSEEN = [401, 403, 404];
// It is kept here alone, and so forgotten with the page.
let key = "";

async function ask(path, body) {
  let answer;
  try {
    const known = key === "" ? {} : { Authorization: `Bearer ${key}` };
    answer = await fetch(path, body === undefined ? { headers: known } : {
      method: "POST",
      headers: { ...known, "Content-Type": "application/json", "X-Deadline-Ms": DEADLINE_MS },
      body,
    });
  } catch {
    throw new Problem("The service does not answer.");
  }
  const text = await answer.text();
  if (!answer.ok) {
    let problem = { title: `The service answered ${answer.status}`, detail: "" };
    try { problem = JSON.parse(text); } catch { /* a proxy's answer, say */ }
    if (answer.status === UNKNOWN) askForKey();
    throw new Problem(`${problem.title}: ${problem.detail}`, answer.status);
  }
  return { text, headers: answer.headers };
}

const read = ({ text }) => JSON.parse(text.replace(IDS, '$1"$2"'));

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function drawn(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function tell(error) {
  if (error !== null && !(error instanceof Problem)) throw error;
  $("problem").textContent = error === null ? "" : error.message;
  $("problem").hidden = error === null;
}

/** Let a handler's problem be told, and an earlier one be forgotten. */
const told = (handler) => async (event) => {
  event?.preventDefault();
  try {
    tell(null);
    await handler(event);
  } catch (error) {
    tell(error);
  }
};

const nameOf = (item) => item.title ?? `item ${item.item_id}`;
const day = (time) => new Date(1000 * time).toISOString().slice(0, 10);
const moment = (time) => new Date(1000 * time).toISOString().slice(0, 16).replace("T", " ");
const ms = (seconds) => (seconds === Infinity ? "> 1 s" : `${(1000 * seconds).toFixed(1)} ms`);
const arm = () => $("arm").value;

// --- the key ---

function askForKey() {
  $("key-form").hidden = false;
  // Links carry no key.
  for (const link of document.querySelectorAll("[data-guarded]")) link.hidden = true;
}

async function useKey() {
  key = $("key").value.trim();
  state.seesMetrics = true;
  state.first = null;
  await begin();
}

// --- the user ---

async function showUser() {
  const user = $("user").value.trim();
  forget();
  const found = read(await ask(`/users/${encodeURIComponent(user)}/history`));
  state.user = user;
  const behaviors = found.behaviors;
  learnTitles(behaviors);
  $("history-summary").textContent = behaviors.length
    ? `${user}: the newest ${behaviors.length} behaviors, ${day(behaviors[0].time)} to ${day(behaviors.at(-1).time)}.`
    : `${user} is unknown: no history is stored. Scores are those of an empty history.`;
  $("timeline-figure").hidden = $("behaviors-details").hidden = !behaviors.length;
  if (!behaviors.length) return;
  drawTimeline(behaviors);
  $("behaviors").replaceChildren(
    ...behaviors.toReversed().map((one) => element("li", `${moment(one.time)}  ${nameOf(one)}`)),
  );
}

function learnTitles(items) {
  for (const { item_id, title } of items) if (title !== null) state.titles.set(String(item_id), title);
}

function forget() {
  state.user = state.scored = state.chosen = null;
  $("history-summary").textContent = $("scores-summary").textContent = "";
  $("timeline-figure").hidden = $("behaviors-details").hidden = true;
  $("behaviors").replaceChildren();
  $("scores").replaceChildren();
  forgetWhy("Score candidates, then choose one of them.");
}

function drawTimeline(behaviors) {
  const first = behaviors[0].time;
  const span = Math.max(1, behaviors.at(-1).time - first);
  const svg = $("timeline");
  svg.setAttribute("viewBox", "0 0 1000 40");
  svg.setAttribute(
    "aria-label",
    `Timeline of ${behaviors.length} behaviors from ${day(first)} to ${day(behaviors.at(-1).time)}`,
  );
  svg.replaceChildren(
    ...behaviors.map((one) => {
      const x = (996 * (one.time - first)) / span;
      const mark = drawn("rect", { x, y: 4, width: 3, height: 32, "fill-opacity": 0.45 });
      mark.append(drawn("title", {}, `${moment(one.time)}  ${nameOf(one)}`));
      return mark;
    }),
  );
  $("timeline-first").textContent = day(first);
  $("timeline-last").textContent = day(behaviors.at(-1).time);
}

async function showSomeUsers() {
  const { user_ids } = read(await ask("/users/sample?limit=8"));
  $("some-users").replaceChildren(
    ...user_ids.map((user) => {
      const button = element("button", user, { type: "button" });
      button.addEventListener("click", told(async () => {
        $("user").value = user;
        await showUser();
      }));
      return button;
    }),
  );
}

// --- candidates and scores ---

function candidates() {
  const asked = $("candidates").value.split(/[\s,]+/).filter(Boolean);
  const wrong = asked.find((id) => !/^[1-9]\d*$/.test(id));
  if (wrong !== undefined) throw new Problem(`"${wrong}" is no item id: ids are whole numbers above 0.`);
  if (!asked.length) throw new Problem("Name a candidate first, or draw some.");
  if (asked.length > MAX_CANDIDATES) throw new Problem(`${asked.length} candidates are too many for this page: at most ${MAX_CANDIDATES}.`);
  return asked;
}

/** Return the JSON of a request; ids are written as they were typed, whatever their size. */
function requestOf(asked) {
  const named = arm() === "" ? "" : `,"arm":${JSON.stringify(arm())}`;
  return `{"user_id":${JSON.stringify(state.user)},"candidates":[${asked.join(",")}]${named}}`;
}

async function draw() {
  const named = arm() === "" ? "" : `&arm=${encodeURIComponent(arm())}`;
  const { items } = read(await ask(`/items/sample?limit=10${named}`));
  learnTitles(items);
  $("candidates").value = items.map((item) => item.item_id).join(", ");
}

async function score() {
  const asked = candidates();
  if (state.user === null) {
    if (!$("user").value.trim()) throw new Problem("Choose a user first.");
    await showUser();
  }
  const { user } = state;
  const answer = await ask("/score", requestOf(asked));
  if (state.user !== user) return; // another one was chosen meanwhile
  const found = read(answer);
  const total = /total;dur=([\d.]+)/.exec(answer.headers.get("Server-Timing"));
  if (total) showLatency(Number(total[1]) / 1000);
  state.scored = { ...found, asked };
  showScores();
  const degraded = found.degraded ? " The store of histories is away: these are scores without a history." : "";
  const unknown = found.unknown_candidates ? ` ${found.unknown_candidates} of them unknown to the model.` : "";
  $("scores-summary").textContent =
    `${asked.length} scores (${found.score_kind}) by ${found.model}, arm ${found.arm}, from ${found.history_length} behaviors.${unknown}${degraded}`;
}

function showScores() {
  const { scores, asked, score_kind } = state.scored;
  // A probability fills its bar by itself; of affinities only the order means something.
  const least = score_kind === "probability" ? 0 : Math.min(...scores);
  const span = (score_kind === "probability" ? 1 : Math.max(...scores)) - least;
  const order = asked.map((_, i) => i).sort((a, b) => scores[b] - scores[a]);
  const focused = document.activeElement?.dataset?.place;
  $("scores").replaceChildren(
    ...order.map((i) => {
      const button = element("button", undefined, { type: "button", "aria-pressed": "false" });
      button.dataset.place = i;
      const title = state.titles.get(asked[i]);
      const bar = element("span", "", { class: "bar", "aria-hidden": "true" });
      bar.style.width = `${span > 0 ? (100 * (scores[i] - least)) / span : 100}%`;
      button.append(
        element("span", title ? `${title} (${asked[i]})` : `item ${asked[i]}`),
        element("span", scores[i].toPrecision(4)),
        bar,
      );
      button.addEventListener("click", told(() => explain(i)));
      const entry = element("li");
      entry.append(button);
      return entry;
    }),
  );
  mark();
  if (focused !== undefined) $("scores").querySelector(`[data-place="${focused}"]`)?.focus();
}

function mark() {
  for (const button of $("scores").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.place) === state.chosen));
  }
}

// --- why ---

function forgetWhy(reason) {
  state.chosen = null;
  mark();
  $("why-figure").hidden = $("why-scroll").hidden = true;
  $("why-summary").textContent = reason;
}

async function explain(place) {
  const { asked, arm: answering } = state.scored;
  forgetWhy("");
  state.chosen = place;
  mark();
  const model = state.models.find((one) => one.arm === answering);
  if (model && !model.explains) {
    $("why-summary").textContent = `${model.model} gives no explanations: its bundle holds no explain graph.`;
    return;
  }
  const found = read(await ask("/explain", requestOf([asked[place]])));
  if (state.chosen !== place) return; // another one was chosen meanwhile
  const [candidate] = found.candidates;
  const known = candidate.known ? "" : " The model does not know this item.";
  $("why-summary").textContent = found.behaviors.length
    ? `${nameOf(candidate)} has the score ${candidate.score.toPrecision(4)}: what each of ${found.history_length} behaviors weighed in it, in ${found.iterations} iterations.${known}`
    : `${nameOf(candidate)} has the score ${candidate.score.toPrecision(4)} from no behavior at all.${known}`;
  if (!found.behaviors.length) return;
  drawWhy(found, candidate);
  listWhy(found, candidate);
  $("why-figure").hidden = $("why-scroll").hidden = false;
}

function drawWhy({ behaviors, iterations }, { weights }) {
  const svg = $("why");
  svg.setAttribute("viewBox", `0 0 ${behaviors.length} ${iterations}`);
  svg.replaceChildren(
    ...weights.flatMap((row, pass) => {
      const most = Math.max(...row);
      return row.map((weight, j) => {
        const opacity = most > 0 ? (weight / most).toFixed(3) : 0;
        const cell = drawn("rect", { x: j, y: pass + 0.04, width: 1, height: 0.92, "fill-opacity": opacity });
        cell.append(drawn("title", {}, `iteration ${pass + 1}: ${nameOf(behaviors[j])}, ${moment(behaviors[j].time)}: ${weight.toPrecision(3)}`));
        return cell;
      });
    }),
  );
}

function listWhy({ behaviors, iterations }, { weights }) {
  const head = element("tr");
  const passes = Array.from({ length: iterations }, (_, pass) => `Iteration ${pass + 1}`);
  head.append(...["Behavior", "When", ...passes].map((text) => element("th", text, { scope: "col" })));
  $("why-head").replaceChildren(head);
  const sums = behaviors.map((_, j) => weights.reduce((sum, row) => sum + row[j], 0));
  const heaviest = behaviors.map((_, j) => j).sort((a, b) => sums[b] - sums[a]).slice(0, SHOWN_BEHAVIORS);
  $("why-rows").replaceChildren(
    ...heaviest.map((j) => {
      const row = element("tr");
      row.append(
        element("th", nameOf(behaviors[j]), { scope: "row" }),
        element("td", moment(behaviors[j].time)),
        ...weights.map((of) => element("td", of[j].toPrecision(3))),
      );
      return row;
    }),
  );
}

// --- latency, batches, arms ---

function showLatency(seconds) {
  state.latencies.push(seconds);
  state.latencies.splice(0, state.latencies.length - SHOWN_LATENCIES);
  const within = state.latencies.filter((one) => one <= BUDGET_S).length;
  $("own-latency").textContent =
    `The latest score took ${ms(seconds)}, ${seconds <= BUDGET_S ? "within" : "outside of"} 30 ms; ${within} of the latest ${state.latencies.length} were within.`;
  const top = Math.max(2 * BUDGET_S, ...state.latencies);
  const y = (value) => 116 - (112 * value) / top;
  $("latency").replaceChildren(
    drawn("line", { x1: 0, x2: 600, y1: y(BUDGET_S), y2: y(BUDGET_S) }),
    drawn("text", { x: 4, y: y(BUDGET_S) - 4 }, "30 ms"),
    ...state.latencies.map((value, i) =>
      drawn("circle", { cx: 5 + 10 * i, cy: y(value), r: 4, class: value > BUDGET_S ? "late" : "" })),
  );
}

/** Return the samples of Prometheus' text format: [{name, labels, value}]. */
function samples(text) {
  const found = [];
  for (const line of text.split("\n")) {
    const parts = /^(\w+)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!parts) continue;
    const labels = {};
    for (const [, key, value] of (parts[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) labels[key] = value;
    found.push({ name: parts[1], labels, value: Number(parts[3].replace("+Inf", "Infinity")) });
  }
  return found;
}

function figuresOf(found, name) {
  const of = (metric) => found.filter((one) => one.name === metric && one.labels.arm === name);
  const total = (metric) => of(metric).reduce((sum, one) => sum + one.value, 0);
  const edges = new Map();
  for (const { labels, value } of of("mneme_stage_seconds_bucket")) {
    if (labels.stage !== "total") continue;
    const edge = Number(labels.le.replace("+Inf", "Infinity"));
    edges.set(edge, (edges.get(edge) ?? 0) + value);
  }
  return { edges, requests: total("mneme_batch_requests_sum"), batches: total("mneme_batch_requests_count") };
}

/** Return the upper edge within which a share of the requests were answered. */
function percentile(edges, share) {
  const all = edges.get(Infinity) ?? 0;
  return [...edges.keys()].sort((a, b) => a - b).find((edge) => edges.get(edge) >= share * all);
}

function armRow(model, now, first) {
  const edges = new Map([...now.edges].map(([edge, n]) => [edge, n - (first?.edges.get(edge) ?? 0)]));
  const answered = edges.get(Infinity) ?? 0;
  const batches = now.batches - (first?.batches ?? 0);
  const requests = now.requests - (first?.requests ?? 0);
  const cells = [
    model.model,
    `${Math.round(100 * model.share)} %${model.shadow ? ", shadow" : ""}`,
    answered,
    answered ? `${((100 * (edges.get(BUDGET_S) ?? 0)) / answered).toFixed(1)} %` : "–",
    ...[0.5, 0.99].map((share) => (answered ? `≤ ${ms(percentile(edges, share))}` : "–")),
    batches ? (requests / batches).toFixed(1) : "–",
  ];
  const row = element("tr");
  row.append(element("th", model.arm, { scope: "row" }), ...cells.map((text) => element("td", text)));
  return row;
}

async function showState() {
  const used = key;
  if (state.seesMetrics) {
    try {
      await showMetrics();
      return;
    } catch (error) {
      if (!UNSEEN.includes(error.status)) throw error;
      if (used === key) state.seesMetrics = false; // until there is another key
    }
  }
  $("all-requests").hidden = true;
  try {
    await ask("/readyz");
    tellState("The service answers.", true);
  } catch (error) {
    if (error.status !== NOT_READY) throw error;
    tellState("The service is not ready.", false);
  }
}

async function showMetrics() {
  const found = samples((await ask("/metrics")).text);
  $("all-requests").hidden = false;
  const isUp = found.some((one) => one.name === "mneme_redis_up" && one.value === 1);
  tellState(isUp ? "The service answers, and Redis does." : "Redis is away: histories cannot be read.", isUp);
  const now = new Map(state.models.map((model) => [model.arm, figuresOf(found, model.arm)]));
  state.first ??= now;
  $("arms").replaceChildren(
    ...state.models.map((model) => armRow(model, now.get(model.arm), state.first.get(model.arm))),
  );
}

function tellState(text, isGood) {
  const place = $("redis");
  place.className = `state ${isGood ? "good" : "bad"}`;
  // Said once, and not at every look.
  if (place.textContent !== text) place.textContent = text;
}

async function showModels() {
  state.models = read(await ask("/models")).models;
  const names = state.models.filter((model) => !model.shadow).map((model) => model.arm);
  const chosen = arm();
  $("arm").replaceChildren(
    element("option", "the user's own", { value: "" }),
    ...names.map((name) => element("option", name, { value: name })),
  );
  $("arm").value = names.includes(chosen) ? chosen : "";
}

async function poll() {
  try {
    if (!document.hidden) await showState();
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    tellState(error.message, false);
  }
  setTimeout(poll, POLL_MS);
}

async function begin() {
  await showModels();
  await showSomeUsers();
}

let ticking;

function scoreAgain() {
  clearInterval(ticking);
  if ($("again").checked) ticking = setInterval(scoreOnceMore, AGAIN_MS);
}

const scoreOnceMore = told(async () => {
  try {
    await score();
  } catch (error) {
    // One problem is told once.
    $("again").checked = false;
    scoreAgain();
    throw error;
  }
});

$("user-form").addEventListener("submit", told(showUser));
$("candidates-form").addEventListener("submit", told(async () => {
  forgetWhy("Choose a candidate to see why it got its score.");
  await score();
}));
$("sample").addEventListener("click", told(draw));
$("arm").addEventListener("change", told(async () => forgetWhy("Score candidates, then choose one of them.")));
$("again").addEventListener("change", scoreAgain);
$("key-form").addEventListener("submit", told(useKey));
await told(begin)();
poll();
