// The charts of metrics.jsonl: one colour per run, one chart per value.
const MARKS = { // event -> shape, tone, word
  saved: ["tick", "quiet", "saved"], resumed: ["up", "", "resumed"], skipped: ["cross", "loud", "step skipped"], error: ["cross", "loud", "error"],
  rolled_back: ["back", "loud", "rolled back"],
};
const OTHER = ["diamond", "loud", "warning, signal, hang, lost, slow"];
const AXES = {
  step: { label: "steps", value: (run, step) => step, text: (x) => `step ${format(x)}` },
  images: { label: "images", value: (run, step) => (run.batch ? step * run.batch : null), text: (x) => `${format(x)} images` },
  hours: { label: "hours", value: hoursAt, text: (x) => `${format(x)} h` },
};

function hoursAt(run, step) {
  const { x, y } = run.hours;
  if (!x.length) return null;
  if (step <= x[0]) return y[0];
  const last = x.length - 1;
  if (step >= x[last]) return y[last];
  let a = 0, b = last;
  while (b - a > 1) { const m = (a + b) >> 1; if (x[m] <= step) a = m; else b = m; }
  return y[a] + ((y[b] - y[a]) * (step - x[a])) / (x[b] - x[a]);
}

// Exponentially weighted mean over both sides, so without lag; weights depend on the distance along the axis, so they
// hold for downsampled points too.
function smoothed(x, y, amount) {
  const tau = (amount / 100) ** 2 * 0.25 * (x[x.length - 1] - x[0]);
  if (!tau) return y;
  const sums = y.map(() => 0), weights = y.map(() => 0);
  const pass = (indices) => {
    let sum = 0, weight = 0, before = null;
    for (const i of indices) {
      const keep = before === null ? 0 : Math.exp(-Math.abs(x[i] - x[before]) / tau);
      sum = sum * keep + y[i];
      weight = weight * keep + 1;
      sums[i] += sum;
      weights[i] += weight;
      before = i;
    }
  };
  const indices = y.map((_, i) => i);
  pass(indices);
  pass(indices.slice().reverse());
  return y.map((v, i) => (sums[i] - v) / (weights[i] - 1)); // both passes include the point itself
}

function seriesOf(report, state, chart) {
  const axis = AXES[state.x], lines = [], refs = chart.references.map(([y, label]) => ({ y, label }));
  report.runs.forEach((run, index) => {
    if (state.hidden.has(index)) return;
    for (const spec of chart.lines) {
      const value = run.values[spec.name];
      if (!value) continue;
      const place = (s) => axis.value(run, s), x = value.x.map(place);
      if (x.some((v) => v === null)) continue;
      const many = chart.lines.filter((l) => report.names.has(l.name)).length > 1;
      const name = many && spec.label ? `${run.name}, ${spec.label}` : run.name;
      const smooth = !chart.smooth || spec.style === "points" || state.smooth === 0 || x.length < 8 ? value.y : smoothed(x, value.y, state.smooth);
      lines.push({ run: index, name, style: spec.style, x, y: smooth, raw: smooth === value.y ? null : { x, y: value.y }, bad: value.bad.map(place), dots: x.length <= 12 });
    }
    if (chart.reference === "chance" && run.chance && !refs.some((r) => r.y === run.chance)) refs.push({ y: run.chance, label: "chance" });
  });
  const marks = [];
  if (state.marks)
    report.runs.forEach((run, index) => {
      if (state.hidden.has(index)) return;
      const prefix = report.runs.length > 1 ? `${run.name}: ` : "";
      for (const e of run.events) {
        if (["started", "finished"].includes(e.event)) continue;
        const x = axis.value(run, e.step), [shape, tone] = MARKS[e.event] || OTHER;
        if (x !== null) marks.push({ x, run: index, shape, tone, text: `${prefix}${e.event} at step ${e.step}${e.event === "saved" ? "" : `: ${e.text || ""}`}` });
      }
    });
  const styles = chart.lines.filter((l) => l.label && report.names.has(l.name)).map((l) => ({ dashed: "dashed: ", points: "points: ", line: "line: " })[l.style] + l.label);
  return { lines, refs, marks, xLabel: axis.label, which: styles.join(", ") };
}

function buildCharts(parent, report, state) {
  for (const group of report.groups) {
    make("h3", {}, parent, group.title);
    const box = make("div", { class: "group" }, parent);
    for (const chart of group.charts)
      new Plot(box, { title: chart.title, note: chart.note, unit: chart.unit, log: chart.log, zero: chart.zero, family: "metrics", fromZero: true,
        xFormat: (x) => AXES[state.x].text(x), data: () => seriesOf(report, state, chart) });
  }
}

function buildDistances(parent, report, state) {
  const shown = report.runs.filter((run) => run.distances);
  const uniform = [...new Set(shown.map((run) => run.distances.uniform))];
  new Plot(parent, { title: "Attention distance per block", unit: "", zero: true, family: "distances", height: 260, xFormat: (x) => `block ${x}`,
    note: `Mean distance, in tokens, between a query and the keys it attends to; line: mean of the heads, faint dots: each head. ${shown[0].distances.caption}`,
    data: () => ({
      xLabel: "block", xWhole: true, refs: uniform.map((y) => ({ y, label: "uniform attention" })),
      lines: report.runs.map((run, index) => ({ run, index })).filter(({ run, index }) => run.distances && !state.hidden.has(index)).map(({ run, index }) => ({
        run: index, name: run.name, style: "line", dots: true, x: run.distances.means.map((_, i) => i + 1), y: run.distances.means,
        spots: run.distances.heads.flatMap((heads, i) => heads.map((d) => [i + 1, d])),
      })),
    }) });
}
