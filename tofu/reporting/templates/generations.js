// ---- the browser of generations ----
const MOST = 2000; // rows in the list at a time
const dialog = byId("browser");
const ROLES = { truth: "Truth", before: "Before (starting model)", after: "After (this run)", retain: "Retain model" };
const opened = new Map(); // run -> its rows and texts
let current = -1; // the run that is shown
let hits = []; // [run, row] as listed
let chosen = -1; // of hits
let turn = 0; // of openings: a slow one does not come over a later one

for (const [role, name] of Object.entries(ROLES)) byId("against").append(make("option", { value: role, textContent: name }));

async function load(i) {
  const known = texts.of[runs[i].name];
  const set = texts.sets[known.set];
  const ids = { question: set.question, truth: set.truth, before: known.before, after: known.after, retain: known.retain };
  const found = { rows: set.rows };
  await Promise.all(Object.entries(ids).map(async ([role, id]) => { if (id) found[role] = await unpack(id); }));
  return found;
}
async function openRun(i, wanted = null) {
  const mine = ++turn;
  const run = runs[i];
  let why = texts.of[run.name]?.why ?? null;
  if (!why && !opened.has(i)) {
    try { opened.set(i, await load(i)); } catch (error) { why = error.message; }
  }
  if (mine !== turn) return;
  const row = wanted ?? (chosen >= 0 ? rowOf(hits[chosen]) : null);
  head(i);
  byId("why").hidden = !why;
  byId("why").textContent = why ? `Nothing to show: ${why}.` : "";
  for (const part of dialog.querySelectorAll(".tools, .panes")) part.hidden = !opened.size;
  if (!dialog.open) { dialog.showModal(); byId("rows").focus(); }
  list(row);
}
function head(i) {
  const run = runs[i];
  current = i;
  byId("browser-title").textContent = run.name + (run.collapsed.length ? " † collapsed" : "");
  const keys = data.keys.map((name) => `${name} ${brief(run.keys[name])}`);
  if (run.step !== null) keys.push(`step ${run.step}`);
  byId("settings").replaceChildren(keys.join(", "), ...Object.entries(run.files).flatMap(([name, file]) => [
    " · ", make("a", { href: data.files[file], textContent: name }),
  ]));
  showOpened();
  keep({ run: run.name });
}
const rowOf = ([run, row]) => opened.get(run).rows[row];
function showOpened() {
  byId("opened").replaceChildren(...[...opened.keys()].map((i) => {
    const button = make("button", { type: "button", title: `show ${runs[i].name}` }, ...parts(runs[i].name));
    button.setAttribute("aria-pressed", i === current);
    button.addEventListener("click", () => openRun(i));
    return button;
  }));
}
// The rows that the search and the set allow: of the run that is shown, or, while a reader searches, of all opened ones
function list(row = null) {
  const wanted = byId("find").value.trim().toLowerCase();
  const known = [...new Set([...opened.values()].flatMap((one) => one.rows.map(([name]) => name)))];
  const set = known.includes(byId("set").value) ? byId("set").value : "";
  byId("set").replaceChildren(...["", ...known].map((name) => make("option", { value: name, textContent: name || "all" })));
  byId("set").value = set;
  hits = [];
  for (const i of wanted ? opened.keys() : opened.has(current) ? [current] : []) {
    const one = opened.get(i);
    one.rows.forEach(([name], k) => {
      if (set && name !== set) return;
      const all = ["question", ...Object.keys(ROLES)].map((role) => one[role]?.[k] ?? "");
      if (!wanted || all.some((text) => text.toLowerCase().includes(wanted))) hits.push([i, k]);
    });
  }
  const shown = hits.slice(0, MOST);
  byId("count").textContent = counted(hits.length, "row") + (wanted ? ` in ${counted(opened.size, "opened run")}` : "")
    + (hits.length > MOST ? `, the first ${MOST} are listed` : "");
  let heading = null;
  byId("rows").replaceChildren(...shown.flatMap(([i, k], n) => {
    const one = opened.get(i);
    const line = make("li", { id: `row-${n}` }, make("b", { textContent: one.rows[k].join(" ") }), ` ${one.question[k]}`);
    line.setAttribute("role", "option");
    if (!wanted || heading === i) return [line];
    heading = i;
    const name = make("li", { className: "of", textContent: runs[i].name });
    name.setAttribute("role", "presentation");
    return [name, line];
  }));
  hits = shown;
  chosen = -1;
  const same = row ? hits.findIndex((hit) => hit[0] === current && rowOf(hit).join() === row.join()) : -1;
  choose(Math.max(same, hits.length ? 0 : -1));
}
function choose(n) {
  byId(`row-${chosen}`)?.removeAttribute("aria-selected");
  chosen = n;
  const line = byId(`row-${n}`);
  if (!line) {
    byId("rows").removeAttribute("aria-activedescendant");
    byId("texts").replaceChildren(opened.has(current) ? "No row matches." : "");
    return;
  }
  line.setAttribute("aria-selected", "true");
  byId("rows").setAttribute("aria-activedescendant", line.id);
  line.scrollIntoView({ block: "nearest" });
  if (hits[n][0] !== current) head(hits[n][0]); // a hit in another opened run
  showTexts();
  keep({ row: rowOf(hits[n]) });
}
function showTexts() {
  const [i, k] = hits[chosen];
  const shown = opened.get(i);
  const known = texts.of[runs[i].name];
  const [set, key] = shown.rows[k];
  const against = byId("against").value;
  const reference = shown[against]?.[k] ?? null;
  const cards = Object.entries(ROLES).map(([role, name]) => {
    const source = role === "after" ? runs[i].name : known[`${role}_of`] ?? "";
    return card(role, name, source, shown[role]?.[k] ?? null, role === against ? null : reference);
  });
  byId("texts").replaceChildren(
    make("h3", { textContent: `${set} ${key}` }),
    make("p", { className: "question", textContent: shown.question[k], title: known.tags.filter(Boolean).length ? `in the prompt's tags: ${known.tags.join(" … ")}` : "" }),
    make("div", { className: "cards" }, ...cards),
  );
}
function card(role, name, source, text, reference) {
  const body = make("p", { className: "text" });
  if (text === null) body.append(make("i", { textContent: source || role === "truth" ? "It has none of this row." : "No log of it is known." }));
  else if (!text) body.append(make("i", { textContent: "(empty)" }));
  else body.append(...marked(reference, text).map(([differs, part]) => (differs ? make("mark", { textContent: part }) : part)));
  const title = make("h4", { textContent: name });
  if (source) title.append(make("small", {}, ...parts(source)));
  return make("section", { className: `card ${role}` }, title, body);
}
// A text's parts, [whether its words are not in the reference, part]: the longest common subsequence of words
const segmenter = Intl.Segmenter ? new Intl.Segmenter(undefined, { granularity: "word" }) : null;
function wordsOf(text) {
  if (segmenter) return [...segmenter.segment(text)].map((one) => [one.segment, one.isWordLike]);
  return (text.match(/[\p{L}\p{N}]+|[^\p{L}\p{N}]+/gu) ?? []).map((one) => [one, /[\p{L}\p{N}]/u.test(one)]);
}
function marked(reference, text) {
  if (reference === null) return [[false, text]];
  const words = (parts) => parts.filter((one) => one[1]).map((one) => one[0].toLowerCase());
  const parts = wordsOf(text);
  const [a, b] = [words(wordsOf(reference)), words(parts)];
  if (a.length * b.length > 4e6) return [[false, text]];
  const width = b.length + 1;
  const longest = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      longest[i * width + j] = a[i] === b[j] ? longest[(i + 1) * width + j + 1] + 1
        : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
    }
  }
  const common = new Set();
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) { common.add(j); i++; j++; }
    else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) i++;
    else j++;
  }
  const found = [];
  let word = 0;
  for (const [part, isWord] of parts) {
    const differs = isWord && !common.has(word);
    if (isWord) word++;
    if (found.length && found.at(-1)[0] === differs) found.at(-1)[1] += part;
    else found.push([differs, part]);
  }
  const joined = [];
  found.forEach(([differs, part], n) => { // a blank between two marked words is marked with them
    const between = !differs && n > 0 && n + 1 < found.length && !part.trim();
    if (joined.length && joined.at(-1)[0] === (differs || between)) joined.at(-1)[1] += part;
    else joined.push([differs || between, part]);
  });
  return joined;
}
function nextRun(step) {
  const order = table.rows({ search: "applied", order: "applied" }).indexes().toArray().filter((i) => i === current || !texts.of[runs[i].name]?.why);
  if (!order.length) return;
  openRun(order[(order.indexOf(current) + step + order.length) % order.length]);
}
const nextRow = (step) => { if (hits.length) choose(Math.min(hits.length - 1, Math.max(0, chosen + step))); };
byId("rows").addEventListener("click", (event) => {
  const line = event.target.closest("[role=option]");
  if (line) choose(Number(line.id.slice("row-".length)));
});
let pause;
byId("find").addEventListener("input", () => { clearTimeout(pause); pause = setTimeout(() => list(chosen >= 0 ? rowOf(hits[chosen]) : null), 80); });
byId("set").addEventListener("change", () => list(chosen >= 0 ? rowOf(hits[chosen]) : null));
byId("against").addEventListener("change", () => { if (chosen >= 0) showTexts(); });
byId("previous").addEventListener("click", () => nextRun(-1));
byId("next").addEventListener("click", () => nextRun(1));
byId("close").addEventListener("click", () => { turn++; dialog.close(); });
byId("keys-close").addEventListener("click", () => byId("keys").close());
byId("help").addEventListener("click", () => byId("keys").showModal());
byId("theme").addEventListener("click", () => switchTheme());
dialog.addEventListener("cancel", () => { turn++; });
dialog.addEventListener("close", () => { if (!dialog.open) keep({ run: null, row: null }); }); // it comes late: another may be open
