/* The page around the charts: figures, bars, events, configs; and its refreshing. */

const AXES = { step: "Steps", time: "Time", tokens: "Tokens" };
const GOODPUT = { steps: "c2", skipped: "c4", repeated: "c1", saving: "c0", evaluating: "c3", exporting: "c6", uploading: "c4", starting: "c5", waiting: "c7" };
const BAD = /hang|lost|oom|error|signal|config|nonfinite|task|checkpoint/;

function pill(run) {
  const kind = BAD.test(run.state) ? "bad" : run.state;
  return node("span", { class: `pill ${kind}`, title: run.reason }, run.state);
}

function head() {
  const { runs } = content, [run] = runs;
  const made = new Date(content.made * 1000).toLocaleString();
  if (runs.length === 1) {
    const reason = BAD.test(run.state) || run.state === "signal" ? [node("p", { class: "path" }, run.reason)] : [];
    return [node("header", {}, node("div", { class: "head" }, node("h1", {}, run.name), pill(run)),
      node("p", { class: "path" }, `${run.path} · ${content.live_s ? "live, " : ""}${made}`), ...reason), tiles(run)];
  }
  const names = [...new Set(runs.flatMap((r) => Object.keys(r.figures)))];
  const rows = runs.map((r, i) => node("tr", {}, node("td", {}, dot(`c${i % 8}`), r.name), node("td", {}, pill(r)),
    ...names.map((name) => node("td", {}, r.figures[name] ?? "–"))));
  return [node("header", {}, node("h1", {}, runs.map((r) => r.name).join(", ")), node("p", { class: "path" }, made)),
    node("div", { class: "card scroll", style: "margin-top:18px" }, table(["run", "", ...names], rows, "runs"))];
}

function tiles(run) {
  const items = Object.entries(run.figures).map(([name, text]) => {
    const [value, ...rest] = text.split(/ (?=of|at|[a-zA-Z]+\/s)/);
    return node("div", { class: "tile" }, node("dt", {}, name),
      node("dd", { "data-figure": name }, value, node("small", {}, rest.length ? ` ${rest.join(" ")}` : "")));
  });
  return node("dl", { class: "tiles" }, ...items);
}

const table = (names, rows, kind) => node("table", { class: kind },
  node("thead", {}, node("tr", {}, ...names.map((name) => node("th", {}, name)))), node("tbody", {}, ...rows));

function bar(shares, colors, format) {
  const total = shares.reduce((sum, share) => sum + share.seconds, 0) || 1;
  const shown = shares.filter((share) => share.seconds / total > 0.0005);
  const percent = (share) => `${(100 * share.seconds / total).toFixed(1)}%`;
  return [node("div", { class: "share" }, ...shown.map((s) => node("i", { title: `${s.label} ${percent(s)}`,
    style: `width:${percent(s)};background:var(--${colors[s.label] ?? "c7"})` }))),
    node("div", { class: "keys" }, ...shown.map((s) => node("span", { title: s.text ?? "" }, dot(colors[s.label] ?? "c7"),
      s.label, node("b", {}, percent(s)), node("span", { class: "quiet" }, format(s.seconds)))))];
}

const duration = (s) => s < 60 ? `${s.toFixed(1)} s` : s < 3600 ? `${(s / 60).toFixed(1)} min` : s < 172800 ? `${(s / 3600).toFixed(1)} h` : `${(s / 86400).toFixed(1)} d`;
const moment = (s) => s < 0.1 ? `${(s * 1000).toPrecision(3)} ms` : `${s.toPrecision(3)} s`;

function bars(title, key, colors, format) {
  const runs = content.runs.filter((run) => run[key].length);
  if (!runs.length) return [];
  const parts = runs.map((run) => node("div", {}, ...(content.runs.length > 1 ? [node("p", { class: "note" }, run.name)] : []),
    ...bar(run[key], colors, format)));
  return [node("section", { class: "card wide", id: key }, node("h3", {}, title), node("div", { class: "bars", style: "margin:10px 0 4px" }, ...parts))];
}

function slowest() {
  const runs = content.runs.filter((run) => run.slowest.length > 1);
  if (!runs.length) return [];
  const parts = runs.map((run) => {
    const colors = {}, shares = run.slowest.map(([rank, share, phase], i) => {
      const label = `rank ${rank}${phase && `, mostly in ${phase}`}`;
      colors[label] = `c${i % 8}`;
      return { label, seconds: share };
    });
    return node("div", {}, ...(content.runs.length > 1 ? [node("p", { class: "note" }, run.name)] : []), ...bar(shares, colors, () => ""));
  });
  return [node("section", { class: "card wide", id: "slowest" }, node("h3", {}, "Which rank was the slowest, in so many of the steps"),
    node("div", { class: "bars", style: "margin:10px 0 4px" }, ...parts))];
}

function panel() {
  const axes = Object.keys(AXES).filter((axis) => axis === "step" || content.runs.every((run) => run.axes[axis]));
  const present = KINDS.filter((kind) => content.runs.some((run) => run.marks.some((mark) => mark[2] === kind)));
  const choose = axes.map((axis) => node("button", { "aria-pressed": String(view.axis === axis), "data-axis": axis,
    onclick: () => { view.axis = axis; view.zoom = null; render(); } }, AXES[axis]));
  const kinds = present.map((kind) => node("button", { "aria-pressed": String(view.kinds.has(kind)), "data-kind": kind,
    onclick: () => { view.kinds.delete(kind) || view.kinds.add(kind); render(); } }, dot(kind), kind));
  const whole = node("button", { id: "whole", onclick: () => zoomTo(null) }, "whole run");
  whole.hidden = !view.zoom;
  return node("nav", { class: "panel" }, node("div", { class: "group" }, ...choose, whole), node("div", { class: "group" }, ...kinds));
}

function sections() {
  const names = ["Training", "Speed", "Machine", "Other metrics"];
  const extra = {
    Speed: [...bars("Where the time has gone", "goodput", GOODPUT, duration),
      ...bars("What a step spends its time on, on average", "phases", { data: "c0", forward: "c1", backward: "c2", optimizer: "c3" }, moment)],
    Machine: slowest(),
  };
  return names.flatMap((name) => {
    const cards = content.charts.filter((chart) => chart.section === name)
      .map((chart) => node("section", { class: `card chart${chart.wide ? " wide" : ""}`, id: `chart-${chart.name}` }));
    const more = extra[name] ?? [], narrow = cards.filter((card) => !card.classList.contains("wide"));
    if (narrow.length % 2) narrow.at(-1).classList.add("wide"); // no hole beside it
    return cards.length + more.length ? [node("h2", {}, name), node("div", { class: "charts" }, ...more, ...cards)] : [];
  });
}

function events() {
  const many = content.runs.length > 1;
  const marks = content.runs.flatMap((run, i) => run.marks.map((mark) => [run, i, ...mark])).filter(([, , , , kind]) => view.kinds.has(kind));
  if (!marks.length) return [];
  const rows = marks.sort((a, b) => (a[2] ?? 0) - (b[2] ?? 0)).map(([run, i, time, step, kind, text]) => node("tr", {},
    node("td", { class: "fit time" }, time ? new Date(time * 1000).toLocaleString() : ""), node("td", { class: "fit number" }, step ?? ""),
    node("td", { class: "fit" }, dot(kind), kind), ...(many ? [node("td", { class: "fit" }, dot(`c${i % 8}`), run.name)] : []), node("td", {}, text)));
  const left = content.runs.reduce((sum, run) => sum + run.marks_left_out, 0);
  const all = table(["time", "step", "what", ...(many ? ["run"] : []), ""], rows, "events");
  all.querySelector("th").className = "time";
  return [node("h2", {}, `Events: ${rows.length}`), node("div", { class: "card scroll" }, all),
    ...(left ? [node("p", { class: "note" }, `${left} more are not shown`)] : [])];
}

function configs() {
  const rows = content.differences.map(([key, values]) => node("tr", {}, node("td", {}, node("code", {}, key)),
    ...values.map((value) => node("td", {}, node("code", {}, value || "–")))));
  const differ = rows.length ? [node("div", { class: "card scroll" }, table(["key", ...content.runs.map((r) => r.name)], rows, "differences"))] : [];
  const texts = content.runs.map((run) => node("details", { "data-run": run.name }, node("summary", {}, `${run.name}: config.toml`), node("pre", {}, run.config)));
  return [node("h2", {}, rows.length ? "Config: what differs" : "Config"), ...differ, ...texts];
}

function render() {
  const open = new Set([...document.querySelectorAll("details[open]")].map((e) => e.dataset.run));
  const [x, y] = [scrollX, scrollY];
  document.title = `${content.runs.map((run) => run.name).join(", ")} · harness report`;
  document.getElementById("report").replaceChildren(...head(), panel(), ...sections(), ...events(), ...configs(),
    node("footer", {}, `harness ${content.version} · drag over a chart to zoom, double-click for the whole run · curves keep the least and the greatest value of each interval`));
  document.querySelectorAll("details").forEach((e) => (e.open = open.has(e.dataset.run)));
  drawAll();
  scrollTo(x, y);
}

async function refresh() {
  try {
    if (!document.hidden) {
      content = await (await fetch("content.json")).json();
      render();
    }
  } finally {
    setTimeout(refresh, content.live_s * 1000); // also if the server is gone for a while
  }
}

content = JSON.parse(document.getElementById("content").textContent);
readPalette();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readPalette(); plots.forEach((plot) => plot.redraw()); });
render();
if (content.live_s) setTimeout(refresh, content.live_s * 1000);
