// Sample grids by step, and attention maps of one image.
function buildGrids(report, state) {
  const box = document.getElementById("grids"), slider = document.getElementById("grid-step"), now = document.getElementById("grid-now");
  const play = document.getElementById("grid-play");
  const steps = [...new Set(report.runs.flatMap((run) => run.grids.map((g) => g.step)))].sort((a, b) => a - b);
  slider.max = steps.length - 1;
  slider.value = steps.length - 1;
  slider.disabled = play.disabled = steps.length < 2;
  const figures = report.runs.map((run, index) => {
    if (!run.grids.length) return null;
    const figure = make("figure", { "data-run": index }, box), caption = make("figcaption", {}, figure);
    make("span", { class: `swatch r${index % 8}` }, caption);
    return { figure, text: make("span", {}, caption), image: make("img", {}, figure), run };
  });
  const show = () => {
    const step = steps[slider.value];
    now.textContent = `${format(step)} (${Number(slider.value) + 1} of ${steps.length})`;
    slider.setAttribute("aria-valuetext", `step ${step}`);
    figures.forEach((f, index) => {
      if (!f) return;
      f.figure.hidden = state.hidden.has(index);
      const past = f.run.grids.filter((g) => g.step <= step), grid = past[past.length - 1] || f.run.grids[0];
      f.text.textContent = `${f.run.name}, step ${format(grid.step)}${grid.caption ? ` (${grid.caption})` : ""}`;
      f.image.src = grid.source;
      f.image.alt = `Sample grid of ${f.run.name} at step ${grid.step}`;
    });
  };
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "play"; };
  slider.addEventListener("input", () => { stop(); show(); });
  play.addEventListener("click", () => {
    if (timer) return stop();
    play.textContent = "stop";
    if (Number(slider.value) === steps.length - 1) slider.value = -1;
    const next = () => { slider.value = Number(slider.value) + 1; show(); if (Number(slider.value) === steps.length - 1) stop(); };
    timer = setInterval(next, 700);
    next();
  });
  state.onHide.push(show);
  show();
}

async function unpack(text) { // base64 of compressed bytes round(255 sqrt(weight))
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function isDark() {
  const theme = document.documentElement.dataset.theme;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

class Maps {
  static SIDE = 512;

  constructor(report) {
    this.runs = report.runs.filter((run) => run.attention);
    this.get = (name) => document.getElementById(name);
    const select = this.get("map-run");
    this.runs.forEach((run, i) => make("option", { value: i }, select, run.name));
    this.get("map-run-label").hidden = this.runs.length < 2;
    select.addEventListener("change", () => this.load(Number(select.value)));
    this.get("map-block").addEventListener("change", () => this.draw());
    this.get("map-query").addEventListener("input", () => this.draw());
    for (const kind of ["plain", "masked"]) {
      this.get(`${kind}-image`).addEventListener("click", (e) => { const { grid } = this.info, [x, y] = this.cellAt(e, grid); this.select(y * grid + x + 1); });
      this.get(`${kind}-map`).addEventListener("click", (e) => this.select(this.cellAt(e, this.info.size)[1]));
    }
    const first = Math.max(0, this.runs.findIndex((run) => run.attention.trained)); // a run that trains with hidden keys
    select.value = first;
    this.load(first);
  }

  cellAt(e, cells) {
    const box = e.target.getBoundingClientRect(), at = (v) => Math.min(cells - 1, Math.max(0, Math.floor(v * cells)));
    return [at((e.clientX - box.left) / box.width), at((e.clientY - box.top) / box.height)];
  }
  select(query) {
    this.get("map-query").value = Math.min(query, this.info.size - 1);
    this.draw();
  }

  async load(index) {
    const info = this.runs[index].attention;
    const image = new Image();
    const ready = new Promise((done) => { image.onload = done; image.onerror = done; });
    image.src = info.image;
    const [plain, masked] = await Promise.all([unpack(info.plain), unpack(info.masked), ready]);
    Object.assign(this, { info, image, plain, masked, hidden: new Set(info.hidden) });
    this.get("map-caption").textContent = info.caption;
    const block = this.get("map-block"), before = Number(block.value) || info.block;
    block.replaceChildren();
    for (const b of info.blocks) make("option", { value: b }, block, b === info.block ? `${b} (contrastive)` : String(b));
    block.value = info.blocks.includes(before) ? before : info.blocks[info.blocks.length - 1];
    const query = this.get("map-query");
    query.max = info.size - 1;
    if (!this.shown) query.value = Math.round(info.size * 0.75);
    this.shown = true;
    this.draw();
  }

  draw() {
    if (!this.info) return;
    const { size, grid, blocks } = this.info, query = Number(this.get("map-query").value);
    const block = blocks.indexOf(Number(this.get("map-block").value));
    const text = query === 0 ? "the class, predicts token 0" : `token ${query - 1}, predicts token ${query}`;
    this.get("map-now").textContent = query === size - 1 && query === grid * grid - 1 ? `${text} (the last)` : text;
    this.get("map-query").setAttribute("aria-valuetext", text);
    for (const kind of ["plain", "masked"]) {
      const at = block * size * size, bytes = this[kind].subarray(at, at + size * size), hidden = kind === "masked" ? this.hidden : new Set();
      this.drawImage(this.get(`${kind}-image`), bytes, query, hidden);
      this.drawMap(this.get(`${kind}-map`), bytes, query, hidden);
      const share = (bytes[query * size] / 255) ** 2;
      this.get(`${kind}-class`).textContent = `on the class: ${format(share, "%")}`;
    }
  }

  drawImage(canvas, bytes, query, hidden) {
    const { size, grid } = this.info, side = Maps.SIDE, cell = side / grid, pen = canvas.getContext("2d");
    pen.imageSmoothingEnabled = false;
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, side, side);
    pen.drawImage(this.image, 0, 0, side, side);
    const row = Array.from(bytes.subarray(query * size, query * size + size), (b) => (b / 255) ** 2), largest = Math.max(...row.slice(1), 1e-6);
    for (let token = 0; token < grid * grid; token++) {
      const x = (token % grid) * cell, y = Math.floor(token / grid) * cell, key = token + 1;
      pen.fillStyle = key > query ? "rgba(128,134,142,.72)" : `rgba(230,97,0,${(0.88 * row[key]) / largest})`;
      pen.fillRect(x, y, cell, cell);
      if (hidden.has(key) && key <= query) {
        pen.save();
        pen.beginPath();
        pen.rect(x, y, cell, cell);
        pen.clip();
        pen.strokeStyle = "rgba(40,46,54,.75)";
        pen.lineWidth = Math.max(1, cell / 22);
        for (let d = -1; d < 1; d += 0.25) { pen.beginPath(); pen.moveTo(x + d * cell, y); pen.lineTo(x + (d + 1) * cell, y + cell); pen.stroke(); }
        pen.restore();
      }
    }
    const frame = (token, dash) => {
      const w = Math.max(2, cell / 12);
      for (const [colour, wide] of [["#fff", w + 2], ["#0b63c4", w]]) {
        pen.strokeStyle = colour;
        pen.lineWidth = wide;
        pen.setLineDash(dash);
        pen.strokeRect((token % grid) * cell + w / 2 + 1, Math.floor(token / grid) * cell + w / 2 + 1, cell - w - 2, cell - w - 2);
      }
      pen.setLineDash([]);
    };
    if (query > 0) frame(query - 1, []);
    if (query < grid * grid) frame(query, [cell / 5, cell / 7]);
  }

  drawMap(canvas, bytes, query, hidden) {
    const { size } = this.info, side = Maps.SIDE, pen = canvas.getContext("2d"), small = document.createElement("canvas");
    small.width = small.height = size;
    const image = new ImageData(size, size), dark = isDark();
    const paper = dark ? [24, 28, 34] : [255, 255, 255], ink = dark ? [255, 176, 92] : [176, 58, 0], tint = dark ? [38, 62, 92] : [205, 222, 243];
    for (let i = 0; i < size; i++) {
      let largest = 1;
      for (let j = i && 1; j <= i; j++) largest = Math.max(largest, bytes[i * size + j]);
      for (let j = 0; j < size; j++) {
        const share = Math.min(1, bytes[i * size + j] / largest), base = hidden.has(j) ? tint : j > i ? paper.map((v) => v + (dark ? 6 : -8)) : paper; // of square roots
        for (let c = 0; c < 3; c++) image.data[4 * (i * size + j) + c] = base[c] + (ink[c] - base[c]) * share;
        image.data[4 * (i * size + j) + 3] = 255;
      }
    }
    small.getContext("2d").putImageData(image, 0, 0);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(small, 0, 0, side, side);
    const cell = side / size;
    pen.strokeStyle = dark ? "#7ab8ff" : "#0b63c4";
    pen.lineWidth = 2;
    pen.strokeRect(1, Math.min(side - 3, query * cell), side - 2, Math.max(2, cell));
  }
}
