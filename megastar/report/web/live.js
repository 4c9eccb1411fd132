// megastar report --serve: takes new versions of the page over, without losing what the reader has set.
const LIVE_STATE = "megastar-live";

// What a script has built once: where it differs, the page is loaded again.
function shape(doc, data) {
  const sections = [...doc.querySelectorAll("main > section")].map((s) => s.id);
  return JSON.stringify([sections, doc.querySelectorAll(".card").length, data.groups,
    data.runs.map((run) => [run.name, Object.keys(run.values).sort(), run.grids.map((g) => [g.step, g.source.length]), Boolean(run.attention)])]);
}

function keepOpen(before, after) { // which <details> are open
  const open = new Map([...before.querySelectorAll("details")].map((d) => [d.querySelector("summary").textContent.split(":")[0], d.open]));
  for (const d of after.querySelectorAll("details")) d.open = open.get(d.querySelector("summary").textContent.split(":")[0]) ?? d.open;
}

function reload() {
  const kept = { x: state.x, smooth: state.smooth, marks: state.marks, hidden: [...state.hidden].map((i) => report.runs[i].name) };
  try { sessionStorage.setItem(LIVE_STATE, JSON.stringify(kept)); } catch { /* the settings are lost */ }
  location.reload();
}

function restore() {
  let kept = null;
  try { kept = JSON.parse(sessionStorage.getItem(LIVE_STATE)); sessionStorage.removeItem(LIVE_STATE); } catch { /* nothing kept */ }
  if (!kept || !find("charts")) return;
  find("axis").querySelector(`[data-x="${CSS.escape(kept.x)}"]:not([disabled])`)?.click();
  find("smooth").value = kept.smooth;
  find("smooth").dispatchEvent(new Event("input"));
  if (find("marks").checked !== kept.marks) find("marks").click();
  report.runs.forEach((run, index) => { if (kept.hidden.includes(run.name)) find("legend").querySelector(`[data-run="${index}"]`).click(); });
}

let now = document.querySelector('meta[name="megastar-version"]').content, asking = false;
const banner = (text, bad) => { find("live").textContent = text; find("live").classList.toggle("bad", Boolean(bad)); };
const clock = () => new Date().toLocaleTimeString();

let newest = now;
async function update(version) {
  newest = version;
  if (asking) return; // it looks at the newest version when it is done
  if (version === now) return banner(`live, ${clock()}`);
  asking = true;
  try {
    const answer = await fetch("/", { cache: "no-store" });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const doc = new DOMParser().parseFromString(await answer.text(), "text/html");
    const data = JSON.parse(doc.getElementById("data").textContent);
    if (shape(doc, data) !== shape(document, report)) return reload();
    data.runs.forEach((run, index) => Object.assign(report.runs[index], run));
    for (const id of ["runs", "configuration", "events"]) {
      keepOpen(find(id), doc.getElementById(id));
      find(id).replaceChildren(...doc.getElementById(id).childNodes);
    }
    document.title = doc.title;
    document.querySelector(".made").textContent = doc.querySelector(".made").textContent;
    now = doc.querySelector('meta[name="megastar-version"]').content;
    redraw();
    banner(`live, ${clock()}`);
  } catch (error) {
    banner(`not updated at ${clock()}: ${error.message}`, true);
  } finally {
    asking = false;
  }
  if (newest !== version) update(newest);
}

restore();
const events = new EventSource("/events");
events.addEventListener("open", () => banner(`live, ${clock()}`));
events.addEventListener("page", (e) => update(e.data));
events.addEventListener("problem", (e) => banner(e.data, true));
events.addEventListener("error", () => banner(`the server does not answer since ${clock()}; the page shows what was there before`, true));
