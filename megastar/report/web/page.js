// Builds the page: controls, theme, and redrawing.
const report = JSON.parse(document.getElementById("data").textContent);
report.names = new Set(report.runs.flatMap((run) => Object.keys(run.values)));
const state = { x: "step", smooth: 20, marks: true, hidden: new Set(), onHide: [], onTheme: [] };
const find = (name) => document.getElementById(name);

let scheduled = false;
function redraw() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => { scheduled = false; for (const plot of Plot.all) plot.draw(); });
}

function legend() {
  const box = find("legend");
  report.runs.forEach((run, index) => {
    const chip = make("button", { type: "button", class: `chip r${index % 8}`, "aria-pressed": "true", "data-run": index, title: "show or hide" }, box);
    const swatch = make("svg", { width: 22, height: 8, viewBox: "0 0 22 8", "aria-hidden": "true" }, chip);
    make("line", { x1: 0, x2: 22, y1: 4, y2: 4, stroke: "currentColor", "stroke-width": 2.5, "stroke-dasharray": DASHES[Math.floor(index / 8) % 4] }, swatch);
    make("span", {}, chip, run.name);
    chip.addEventListener("click", () => {
      if (!state.hidden.delete(index)) state.hidden.add(index);
      chip.setAttribute("aria-pressed", String(!state.hidden.has(index)));
      redraw();
      for (const callback of state.onHide) callback();
    });
  });
}

function controls() {
  const buttons = [...find("axis").children];
  const press = () => { for (const b of buttons) b.setAttribute("aria-pressed", String(b.dataset.x === state.x)); };
  for (const b of buttons) {
    b.disabled = !report.runs.some((run) => AXES[b.dataset.x].value(run, 1) !== null);
    b.addEventListener("click", () => { state.x = b.dataset.x; press(); redraw(); });
  }
  press();
  find("smooth").addEventListener("input", (e) => { state.smooth = Number(e.target.value); redraw(); });
  find("marks").addEventListener("change", (e) => { state.marks = e.target.checked; redraw(); });
  const kinds = new Set(report.runs.flatMap((run) => run.events.map((e) => e.event)).filter((k) => !["started", "finished"].includes(k)));
  const shown = new Map([...kinds].map((kind) => { const [shape, tone, word] = MARKS[kind] || OTHER; return [shape === "cross" ? kind : shape, [shape, tone, word]]; }));
  if (shown.size) find("glyphs").append("on the time axis: ");
  for (const [shape, tone, word] of shown.values()) {
    const svg = make("svg", { width: 14, height: 12, viewBox: "0 0 14 12", "aria-hidden": "true" }, find("glyphs"));
    make("path", { class: `mark ${tone}`, d: glyph(shape, 7, 6) }, svg);
    find("glyphs").append(` ${word}   `);
  }
}

function theme() {
  const button = find("theme"), order = ["system", "dark", "light"], words = { system: "system", dark: "dark", light: "light" };
  let now = "system";
  try { now = localStorage.getItem("megastar-theme") || now; } catch { /* some browsers have no storage for files */ }
  const apply = () => {
    if (now === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = now;
    button.textContent = `Theme: ${words[now]}`;
    for (const callback of state.onTheme) callback();
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    now = order[(order.indexOf(now) + 1) % order.length];
    try { localStorage.setItem("megastar-theme", now); } catch { /* lasts until the page is closed */ }
    apply();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", apply);
  apply();
}

theme();
if (find("charts")) { legend(); controls(); buildCharts(find("charts"), report, state); }
if (find("distances")) buildDistances(find("distances"), report, state);
if (find("grids")) buildGrids(report, state);
if (find("map-run")) {
  if (typeof DecompressionStream === "undefined") find("map-caption").textContent = "This browser is too old to show the maps (no DecompressionStream).";
  else { const maps = new Maps(report); state.onTheme.push(() => maps.draw()); }
}
for (const plot of Plot.all) plot.draw();
new ResizeObserver(() => redraw()).observe(document.querySelector("main"));
addEventListener("beforeprint", () => { for (const plot of Plot.all) plot.draw(); });
