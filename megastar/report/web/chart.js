// One chart: lines over a numeric axis as SVG, with a crosshair for mouse, touch and keyboard.
const SVG = "http://www.w3.org/2000/svg";
const DASHES = ["", "7 3", "2 3", "9 3 2 3"]; // for runs beyond the eight colours, and for the second line of a chart

function make(name, attributes, parent, text) {
  const node = ["svg", "path", "line", "circle", "text", "g", "title"].includes(name) && parent !== null && name !== "title"
    ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) if (value !== "" && value !== null) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

function format(v, unit) {
  if (unit === "%") return trim((100 * v).toPrecision(3)) + "%";
  const size = Math.abs(v);
  let text;
  if (v === 0) text = "0";
  else if (size >= 1e15 || size < 1e-3) text = v.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  else if (size >= 1e4) text = Math.round(v).toLocaleString("en");
  else text = trim(v.toPrecision(4));
  return text + (unit || "");
}
function trim(text) { return text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : String(Number(text)); }
function brief(v, unit) { // for an axis
  if (unit === "%") return trim((100 * v).toPrecision(6)) + "%";
  const size = Math.abs(v);
  if (v === 0) return "0";
  for (const [at, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]]) if (size >= at) return trim((v / (at === 1e4 ? 1e3 : at)).toPrecision(6)) + letter;
  return size < 1e-4 ? v.toExponential(1).replace(/\.0e/, "e").replace("e+", "e") : trim(v.toPrecision(6));
}

function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough * 0.7);
  const out = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) out.push(i * step);
  return out;
}
function logTicks(low, high) {
  const out = [], wide = Math.log10(high / low);
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
    for (const m of wide > 2.5 ? [1] : wide > 0.8 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9]) {
      const v = m * 10 ** e;
      if (v >= low * 0.999 && v <= high * 1.001) out.push(v);
    }
  return out.length > 1 ? out : ticks(low, high, 4);
}
function nearest(xs, x) { // index of the nearest of sorted numbers
  let a = 0, b = xs.length - 1;
  while (b - a > 1) { const m = (a + b) >> 1; if (xs[m] < x) a = m; else b = m; }
  return Math.abs(xs[a] - x) <= Math.abs(xs[b] - x) ? a : b;
}

class Plot {
  // options: title, note, unit, log, zero, height, xFormat(x), and data() -> {lines, refs, marks, xLabel, xWhole}.
  // A line: {run, name, style: line|dashed|points, x, y, raw: {x, y}, bad: [x], spots: [[x, y]]}.
  static all = [];

  constructor(parent, options) {
    Object.assign(this, { height: 210, log: false, cursor: null }, options);
    this.figure = make("figure", { class: "chart" }, parent);
    const caption = make("figcaption", {}, this.figure);
    make("h4", {}, caption, this.title);
    this.which = make("span", { class: "which" }, caption);
    this.button = make("button", { type: "button", class: "log", "aria-pressed": String(this.log), "aria-label": `${this.title}: logarithmic axis` }, caption, "log");
    this.button.addEventListener("click", () => { this.log = !this.log; this.draw(); });
    if (this.note) make("p", { class: "about" }, caption, this.note);
    this.box = make("div", { class: "plot" }, this.figure);
    this.svg = make("svg", { tabindex: "0", role: "img" }, this.box);
    this.tip = make("div", { class: "tip", hidden: "" }, this.box);
    this.tip.hidden = true;
    const at = (e) => this.hover(e.clientX - this.svg.getBoundingClientRect().left);
    this.svg.addEventListener("pointermove", at);
    this.svg.addEventListener("pointerdown", at);
    this.svg.addEventListener("pointerleave", () => this.leave());
    this.svg.addEventListener("pointercancel", () => this.leave());
    this.svg.addEventListener("blur", () => this.leave());
    this.svg.addEventListener("keydown", (e) => this.key(e));
    Plot.all.push(this);
  }

  draw() {
    const width = Math.max(240, Math.floor(this.box.clientWidth) || 360), height = this.height;
    const data = this.data(), lines = data.lines.filter((l) => l.x.length);
    this.lines = lines;
    this.marks = data.marks || [];
    this.leave();
    const svg = this.svg;
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("aria-label", `${this.title}. ` + (lines.length ? lines.map((l) => `${l.name}: last ${format(l.y[l.y.length - 1], this.unit)}`).join("; ") : "nothing shown"));
    this.which.textContent = [this.unit === "%" ? "" : (this.unit || "").trim(), data.which].filter(Boolean).join("; ");

    const every = lines.flatMap((l) => [l.x, ...(l.raw ? [l.raw.x] : [])]), values = lines.flatMap((l) => [l.y, ...(l.raw ? [l.raw.y] : []), (l.spots || []).map((s) => s[1])]);
    let [x0, x1] = extent(every), [y0, y1] = extent(values);
    for (const m of this.marks) { if (m.x > x1) x1 = m.x; if (m.x < x0) x0 = m.x; }
    const positive = extent(values.map((v) => v.filter((n) => n > 0)));
    const usable = Number.isFinite(positive[0]);
    this.button.disabled = !usable;
    const log = this.log && usable;
    this.button.setAttribute("aria-pressed", String(log));
    if (!Number.isFinite(x0)) [x0, x1, y0, y1] = [0, 1, 0, 1];
    for (const r of log ? [] : data.refs || []) { y0 = Math.min(y0, r.y); y1 = Math.max(y1, r.y); }
    if (this.fromZero && x0 > 0 && x0 < 0.3 * x1) x0 = 0;
    if (x0 === x1) { x0 -= 1; x1 += 1; }
    if (log) {
      [y0, y1] = positive;
      if (y0 === y1) { y0 /= 1.5; y1 *= 1.5; }
    } else {
      if (this.zero && y0 > 0) y0 = 0;
      if (y0 === y1) { const by = Math.abs(y0) * 0.1 || 1; y1 += by; if (!(this.zero && y0 === 0)) y0 -= by; }
      const room = (y1 - y0) * 0.05;
      y1 += room;
      if (!(this.zero && y0 === 0)) y0 -= room;
    }
    const yTicks = log ? logTicks(y0, y1) : ticks(y0, y1, 5);
    const labels = yTicks.map((t) => brief(t, this.unit === "%" ? "%" : ""));
    const left = Math.max(12 + 6.4 * Math.max(...labels.map((t) => t.length)), data.xLabel ? 46 : 30), right = 12, top = 8, strip = this.marks.length ? 12 : 0, bottom = 22 + strip;
    this.frame = { left, right, top, bottom, width, height };
    const px = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - right);
    const f = log ? Math.log : (v) => v;
    const py = (y) => top + (1 - (f(y) - f(y0)) / (f(y1) - f(y0))) * (height - top - bottom);
    Object.assign(this, { px, py, x0, x1, isLog: log });

    yTicks.forEach((t, i) => {
      make("line", { class: "gridline", x1: left, x2: width - right, y1: py(t), y2: py(t) }, svg);
      make("text", { x: left - 6, y: py(t) + 4, "text-anchor": "end" }, svg, labels[i]);
    });
    let xTicks = ticks(x0, x1, Math.max(2, Math.floor((width - left) / 90)));
    if (data.xWhole) xTicks = [...new Set(xTicks.map(Math.round))].filter((t) => t >= x0 && t <= x1);
    xTicks.forEach((t) => make("text", { x: px(t), y: height - 4, "text-anchor": "middle" }, svg, brief(t)));
    make("path", { class: "frame", d: `M${left} ${top}V${height - bottom}H${width - right}` }, svg);
    if (data.xLabel) make("text", { x: 0, y: height - 4 }, svg, data.xLabel);
    for (const r of data.refs || []) {
      if (log && !(r.y >= y0 && r.y <= y1)) continue;
      make("line", { class: "reference", x1: left, x2: width - right, y1: py(r.y), y2: py(r.y) }, svg);
    }
    for (const l of lines) {
      const group = make("g", { class: `series r${l.run % 8}`, "data-run": l.run }, svg);
      if (l.raw) make("path", { class: "raw", d: this.path(l.raw.x, l.raw.y) }, group);
      const dash = DASHES[(Math.floor(l.run / 8) + (l.style === "dashed" ? 1 : 0)) % 4];
      if (l.style !== "points" || l.x.length > 1) make("path", { class: l.style === "points" ? "raw" : "line", d: this.path(l.x, l.y), "stroke-dasharray": dash }, group);
      if (l.style === "points" || l.x.length === 1 || l.dots)
        l.x.forEach((x, i) => { if (!log || l.y[i] > 0) make("circle", { class: "dot", cx: px(x).toFixed(1), cy: py(l.y[i]).toFixed(1), r: l.x.length > 80 ? 1.8 : 3.2 }, group); });
      for (const [x, y] of l.spots || []) if (!log || y > 0) make("circle", { class: "head", cx: px(x).toFixed(1), cy: py(y).toFixed(1), r: 2.2 }, group);
      for (const x of l.bad || []) {
        const at = px(x), cross = make("path", { class: "nan", d: `M${at - 4} ${top}l8 8m-8 0l8-8` }, group);
        cross.append(document.createElementNS(SVG, "title"));
        cross.lastChild.textContent = `${l.name}: not a finite number`;
      }
    }
    for (const r of data.refs || [])
      if (!log || (r.y >= y0 && r.y <= y1)) make("text", { class: "over", x: left + 4, y: py(r.y) - 4 }, svg, r.label);
    const base = height - bottom + 8;
    for (const m of this.marks) make("path", { class: `mark ${m.tone} r${m.run % 8}`, "data-run": m.run, d: glyph(m.shape, px(m.x), base) }, svg);
    this.cross = make("line", { class: "cross", y1: top, y2: height - bottom, visibility: "hidden" }, svg);
    this.spots = make("g", {}, svg);
  }

  path(xs, ys) {
    let out = "", pen = "M";
    for (let i = 0; i < xs.length; i++) {
      if (this.isLog && ys[i] <= 0) { pen = "M"; continue; }
      out += pen + this.px(xs[i]).toFixed(1) + " " + this.py(ys[i]).toFixed(1);
      pen = "L";
    }
    return out;
  }

  hover(at) {
    if (!this.lines || !this.lines.length) return;
    const box = this.svg.getBoundingClientRect(), scale = this.frame.width / box.width;
    this.show(this.x0 + ((at * scale - this.frame.left) / (this.frame.width - this.frame.left - this.frame.right)) * (this.x1 - this.x0));
  }

  show(wanted) {
    const guide = this.lines.reduce((a, b) => (b.x.length > a.x.length ? b : a));
    const x = guide.x[nearest(guide.x, Math.min(this.x1, Math.max(this.x0, wanted)))];
    this.cursor = x;
    this.spots.replaceChildren();
    this.tip.replaceChildren();
    make("b", {}, this.tip, this.xFormat(x));
    const close = (this.x1 - this.x0) * 0.02;
    for (const l of this.lines) {
      const i = nearest(l.x, x);
      if (Math.abs(l.x[i] - x) > (l.style === "points" ? close : 2.5 * close)) continue;
      const row = make("div", {}, this.tip);
      make("span", { class: `swatch r${l.run % 8}` }, row);
      make("span", {}, row, l.style === "points" && l.x[i] !== x ? `${l.name} (${this.xFormat(l.x[i])})` : l.name);
      make("span", { class: "value" }, row, format(l.y[i], this.unit));
      if (!this.isLog || l.y[i] > 0) make("circle", { class: `spot r${l.run % 8}`, cx: this.px(l.x[i]), cy: this.py(l.y[i]), r: 3.6 }, this.spots);
    }
    const near = this.marks.filter((m) => Math.abs(this.px(m.x) - this.px(x)) < 7);
    for (const m of near.slice(0, 4)) make("span", { class: "event" }, this.tip, m.text);
    if (near.length > 4) make("span", { class: "event" }, this.tip, `and ${near.length - 4} more`);
    this.tip.hidden = false;
    const share = (this.px(x) - this.frame.left) / (this.frame.width - this.frame.left - this.frame.right);
    this.tip.style.left = share > 0.5 ? "auto" : `${(100 * this.px(x)) / this.frame.width + 3}%`;
    this.tip.style.right = share > 0.5 ? `${100 - (100 * this.px(x)) / this.frame.width + 3}%` : "auto";
    for (const other of Plot.all) if (other.family === this.family) other.mark(x);
  }

  mark(x) {
    if (!this.cross) return;
    const inside = x !== null && x >= this.x0 && x <= this.x1;
    this.cross.setAttribute("visibility", inside ? "visible" : "hidden");
    if (inside) { this.cross.setAttribute("x1", this.px(x)); this.cross.setAttribute("x2", this.px(x)); }
  }

  leave() {
    this.cursor = null;
    this.tip.hidden = true;
    if (this.spots) this.spots.replaceChildren();
    for (const other of Plot.all) if (other.family === this.family) other.mark(null);
  }

  key(e) {
    if (e.key === "Escape") return this.leave();
    const share = { ArrowRight: 0.02, ArrowLeft: -0.02 }[e.key];
    if (share === undefined && e.key !== "Home" && e.key !== "End") return;
    if (!this.lines.length) return;
    e.preventDefault();
    if (e.key === "Home" || e.key === "End") return this.show(e.key === "Home" ? this.x0 : this.x1);
    const guide = this.lines.reduce((a, b) => (b.x.length > a.x.length ? b : a)), i = nearest(guide.x, this.cursor === null ? (share > 0 ? this.x0 : this.x1) : this.cursor);
    const by = Math.max(1, Math.round(Math.abs(share) * guide.x.length)) * Math.sign(share);
    this.show(guide.x[Math.min(guide.x.length - 1, Math.max(0, this.cursor === null ? i : i + by))]);
  }
}

function extent(lists) {
  let low = Infinity, high = -Infinity;
  for (const list of lists) for (const v of list) { if (v < low) low = v; if (v > high) high = v; }
  return [low, high];
}

function glyph(shape, x, y) {
  const shapes = { tick: `M${x} ${y - 4}v8`, up: `M${x - 4} ${y + 4}l4 -8l4 8z`, cross: `M${x - 3.5} ${y - 3.5}l7 7m-7 0l7 -7`,
    back: `M${x + 4} ${y - 4}v8l-8 -4z`, diamond: `M${x - 4} ${y}l4 -4l4 4l-4 4z` };
  return shapes[shape];
}
