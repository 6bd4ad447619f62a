// ---- the figures ----
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const look = document.documentElement.classList;
let code = null; // Plotly's script: unpacked ahead of need, put in once a figure comes into view or is printed
const unpackCode = () => unpack("plotly").then((text) => { code = text; look.add("printable"); });
function plotly() { // the policy knows the script's digest
  if (!window.Plotly) document.head.append(make("script", { textContent: code }));
  return window.Plotly;
}
const shown = new Map(); // a figure's place -> the function that draws it, anew too: in another theme, on paper
let printing = false;
function inTheme(value) { // black is the retain model's colour: it is the text's, so that it can be seen
  if (Array.isArray(value) || value === null || typeof value !== "object") return value === "#000000" ? colour("--ink") : value;
  return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, inTheme(one)]));
}
function about(i) {
  if (i < 0) return "";
  const settings = data.keys.map((name) => `${name} ${brief(runs[i].keys[name])}`).join(", ");
  const step = runs[i].step === null ? "" : `, step ${runs[i].step}`;
  const collapsed = runs[i].collapsed.length ? "<br>† collapsed" : "";
  return `<b>${escaped(runs[i].name)}</b><br>${escaped(settings + step)}${collapsed}`;
}
// A legend's name, which may be long: cut in the middle; hover has all of it
const brieflyNamed = (name) => escaped(name?.length > 36 ? `${name.slice(0, 17)}…${name.slice(-18)}` : name);
function traceOf(trace, layout) {
  const axis = (name) => layout[name]?.title?.text;
  const x = trace.type === "bar" ? "%{x}" : `${axis("xaxis") ?? "x"}: %{x:.4~g}<br>${trace.choice ? escaped(trace.choice) : axis("yaxis") ?? ""}`;
  return {
    ...inTheme(trace), name: brieflyNamed(trace.name), text: (trace.customdata ?? []).map(about), textposition: "none",
    hovertemplate: `%{text}<br>${x}: %{y:.4~g}<extra></extra>`,
  };
}
function layoutOf(figure, choice, width) {
  const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"), automargin: true };
  const given = figure.layout;
  const y = choice ? { title: { text: escaped(choice) } } : {};
  const shapes = (given.shapes ?? []).map((one) => ({ ...one, line: { ...one.line, color: colour("--soft") } }));
  return {
    ...given, shapes, font: { color: colour("--ink"), family: "system-ui, sans-serif", size: 12 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 56, r: 12, t: 8, b: 48 }, hovermode: "closest",
    hoverlabel: { align: "left", bgcolor: colour("--paper"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", tracegroupgap: 0, bgcolor: "rgba(0,0,0,0)" },
    modebar: { orientation: "v", bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: colour("--accent") },
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", height: width < 480 ? 420 : 400, ...(printing ? { width } : {}),
    xaxis: { ...axis, ...given.xaxis }, yaxis: { ...axis, ...given.yaxis, ...y },
  };
}
const SETUP = { responsive: true, displayModeBar: matchMedia("(pointer: coarse)").matches ? false : "hover", displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]], toImageButtonOptions: { format: "svg" } };
let last = Promise.resolve();
function inTurn(draw, place) { // one figure after another, when the page has nothing else to do
  const idle = () => new Promise((done) => (window.requestIdleCallback ?? setTimeout)(done));
  last = last.then(idle).then(draw).catch((error) => { place.textContent = `The figure can't be drawn: ${error.message}`; });
}
function figureOf(figure) {
  const place = make("div", { className: "plot" });
  place.dataset.name = figure.name;
  const select = make("select", {}, ...(figure.choices ?? []).map((name) => make("option", { value: name, textContent: name })));
  const caption = make("figcaption", { textContent: figure.title });
  if (figure.choices) caption.append(make("label", {}, "Metric ", select));
  const draw = () => {
    const choice = figure.choices ? select.value : null;
    const data = figure.data.filter((trace) => !choice || trace.choice === choice).map((trace) => traceOf(trace, figure.layout));
    const done = plotly().react(place, data, layoutOf(figure, choice, place.clientWidth), SETUP);
    if (place.dataset.drawn) return done;
    place.dataset.drawn = "true";
    place.on("plotly_click", (event) => { const i = event.points[0].customdata; if (i >= 0) openRun(i); });
    return done;
  };
  shown.set(place, draw);
  select.addEventListener("change", () => unpackCode().then(draw));
  let inView = false; // for a while: a search that shortens the table must not wait for figures that come past
  const watch = new IntersectionObserver((seen) => {
    inView = seen.at(-1).isIntersecting;
    if (inView) setTimeout(() => { if (inView) { inView = false; watch.disconnect(); inTurn(() => unpackCode().then(draw), place); } }, 250);
  });
  watch.observe(place);
  return make("figure", {}, caption, place);
}
function showFigures(problem) {
  shown.clear();
  const of = data.figures.filter((figure) => figure.problem === problem);
  const missing = of.filter((figure) => figure.why).map((figure) => make("li", { textContent: `${figure.title}: not drawn, ${figure.why}` }));
  byId("plots").replaceChildren(...of.filter((figure) => !figure.why).map(figureOf), make("ul", { className: "missing" }, ...missing));
}
const problems = [...new Set(data.figures.map((figure) => figure.problem))];
const select = byId("problem").querySelector("select");
select.append(...problems.map((name) => make("option", { value: name, textContent: name })));
select.addEventListener("change", () => showFigures(select.value));
byId("problem").hidden = problems.length < 2;
showFigures(problems[0]);
const drawAgain = () => shown.forEach((draw, place) => { if (place.dataset.drawn) draw(); });
addEventListener("theme", drawAgain);

// ---- on paper ----
// A browser waits for nothing that is not done when "beforeprint" returns: Plotly's script is unpacked before. The class
// `paper` has the looks, light ones also where the page is dark; the table is made as small as its columns need.
setTimeout(() => (window.requestIdleCallback ?? setTimeout)(() => unpackCode().catch(() => {})), 2000);
let wasDark = false;
addEventListener("beforeprint", () => {
  if (printing) return;
  [printing, wasDark] = [true, look.contains("dark")];
  look.remove("dark");
  look.add("paper");
  byId("table").style.zoom = Math.min(1, byId("runs").clientWidth / byId("table").offsetWidth);
  if (code) shown.forEach((draw) => draw());
  else unpackCode();
});
addEventListener("afterprint", () => {
  printing = false;
  look.remove("paper");
  look.toggle("dark", wasDark);
  byId("table").style.zoom = "";
  drawAgain();
  dispatchEvent(new Event("resize")); // the figures take the screen's width again
});
