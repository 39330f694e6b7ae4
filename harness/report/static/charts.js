"use strict";
/* The charts of the page, by uPlot: their curves, marks, legend, and what they have in common. */

const KINDS = ["command", "fault", "restart", "resume", "warning", "save", "export", "evaluation", "end"];
const WITH_LINES = new Set(["command", "fault", "restart", "resume", "end"]); // the others: ticks
const LABELLED = new Set(["command", "fault", "restart"]);
const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3]];
const view = { axis: "step", zoom: null, full: [0, 1], unit: ["steps", 1], kinds: new Set(KINDS), logs: {} };
let content, plots = [], palette = {};

const node = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element[name] = value;
    else if (name === "style") element.style.cssText = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
};
const dot = (color) => node("i", { class: "dot", style: `background:var(--${color})` });

function readPalette() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7", "muted", "grid", "card", "text", ...KINDS])
    palette[name] = style.getPropertyValue(`--${name}`).trim();
}

function short(value) {
  if (value == null || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e4 || (size >= 1e3 && value % 1 === 0 && size % 100 === 0))
    for (const [unit, factor] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]])
      if (size >= factor) return `${+(value / factor).toPrecision(4)}${unit}`;
  return size && size < 1e-3 ? value.toExponential().replace(/(\.\d{2})\d+/, "$1") : `${+value.toPrecision(4)}`;
}

/* x: steps, or hours and tokens by a run's knots */

function interpolate([xs, ys], x) {
  let low = 0, high = xs.length - 1;
  if (x <= xs[0]) return ys[0];
  if (x >= xs[high]) return ys[high];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle;
    else high = middle;
  }
  return ys[low] + ((ys[high] - ys[low]) * (x - xs[low])) / (xs[high] - xs[low]);
}

function onAxis(run, step) {
  const knots = content.runs[run].axes[view.axis];
  return knots ? interpolate(knots, step) * view.unit[1] : view.axis === "step" ? step : null;
}

/** Of a mark: a step that is repeated after a restart has more than one time. */
function whenOnAxis(run, time, step) {
  const { began } = content.runs[run];
  return view.axis === "time" && time && began != null ? ((time - began) / 3600) * view.unit[1] : onAxis(run, step);
}

function findRange() {
  view.unit = view.axis === "tokens" ? ["tokens", 1] : ["steps", 1];
  if (view.axis === "time") {
    const hours = Math.max(...content.runs.map((run) => (run.axes.time ? run.axes.time[1].at(-1) : 0)));
    const units = [["seconds", 3600, 0.05], ["minutes", 60, 3], ["hours", 1, 72], ["days", 1 / 24, Infinity]];
    view.unit = units.find(([, , until]) => hours < until);
  }
  const ends = content.charts.filter((c) => c.by_step).flatMap((chart) =>
    chart.curves.flatMap((c) => (c.x.length ? [onAxis(c.run, c.x[0]), onAxis(c.run, c.x.at(-1))] : [])));
  const known = ends.filter((x) => x != null);
  const [low, high] = known.length ? [Math.min(...known), Math.max(...known)] : [0, 1];
  view.full = [low, high > low ? high : low + 1];
}

function zoomTo(range) {
  view.zoom = range;
  for (const plot of plots) if (plot.chart.by_step) plot.setData(plot.data, true);
  document.getElementById("whole").hidden = !range;
}

/* curves */

function styleOf(chart) {
  const many = content.runs.length > 1, counts = {};
  return chart.curves.map((curve) => {
    const key = many ? curve.run : 0;
    if (curve.role !== "mean") counts[key] = (counts[key] ?? -1) + 1;
    const own = counts[key] ?? 0;
    return { color: `c${(many ? curve.run : own) % 8}`, dash: many && curve.role === "line" ? DASHES[own % 4] : [] };
  });
}

function dataOf(chart) {
  const tables = chart.curves.map((curve) => {
    const xs = [], ys = [];
    curve.x.forEach((step, i) => {
      const x = chart.by_step ? onAxis(curve.run, step) : step, y = curve.y[i];
      if (x != null && !(view.logs[chart.name] && y <= 0)) { xs.push(x); ys.push(y); }
    });
    return [xs, ys];
  });
  return tables.length > 1 ? uPlot.join(tables) : tables[0];
}

function seriesOf(curve, style, log) {
  const color = () => palette[style.color];
  const series = { spanGaps: true, dash: style.dash, stroke: color, width: 1.5, points: { show: false } };
  if (curve.role === "raw") Object.assign(series, { stroke: () => color() + "59", width: 1 });
  if (curve.role === "mean") series.width = 2;
  if (curve.role === "points") Object.assign(series, { width: 2, points: { show: curve.x.length < 60, size: 6, fill: color, stroke: color } });
  if (curve.role === "area") Object.assign(series, { fill: () => color() + "b0", width: 1 });
  if (curve.role === "bars")
    Object.assign(series, { fill: () => color() + "90", width: 1, paths: uPlot.paths.bars({ size: [0.9, 40], align: 1, gap: 1 }) });
  return series;
}

/* the legend: what the curves are where the pointer is, or at their ends */

function swatch({ color, dash }) {
  const mark = dot(color), ends = dash.map((_, i) => dash.slice(0, i + 1).reduce((sum, length) => sum + length));
  const parts = dash.map((length, i) => `${i % 2 ? "transparent" : `var(--${color})`} ${ends[i] - length}px ${ends[i]}px`);
  if (dash.length) mark.style.cssText = `width:22px;height:3px;background:repeating-linear-gradient(90deg,${parts})`;
  return mark;
}

function keyOf(chart, styles) {
  const many = content.runs.length > 1;
  const where = node("span", { class: "where" }), items = [];
  const values = chart.curves.map((curve, i) => {
    const value = node("b");
    if (many && curve.role === "raw") return value;
    const name = content.runs[curve.run].name, isOnly = ["mean", "points", "bars"].includes(curve.role);
    const label = many ? (isOnly ? name : `${name}: ${curve.label}`) : curve.label;
    items.push(node("span", { "data-curve": label }, swatch(styles[i]), label, " ", value));
    return value;
  });
  return { element: node("div", { class: "legend" }, ...items, where), where, values };
}

function showValues(plot) {
  const { chart, key, data } = plot, pointed = plot.cursor.idx;
  const at = pointed ?? data[0].length - 1, x = data[0][at];
  const last = (i) => {
    let row = at;
    while (row >= 0 && data[i + 1][row] == null) row--;
    return row < 0 ? null : data[i + 1][row];
  };
  key.where.textContent = pointed == null ? "" : chart.by_step ? `${short(x)} ${view.unit[0]}` : `${short(x)} s`;
  chart.curves.forEach((curve, i) => {
    const value = last(i), below = curve.role === "area" && i ? last(i - 1) : 0;
    key.values[i].textContent = curve.role === "bars" && pointed == null ? "" : short(value == null ? null : value - below);
  });
}

/* marks */

function marksOf(chart) {
  if (!chart.by_step) return [];
  return content.runs.flatMap((run, number) =>
    run.marks.filter((mark) => view.kinds.has(mark[2]) && mark[1] != null)
      .map(([time, step, kind, text]) => ({ x: whenOnAxis(number, time, step), step, kind, text, number })))
    .filter((mark) => mark.x != null);
}

function drawMarks(plot) {
  const { ctx, bbox, chart, marks } = plot, ratio = uPlot.pxRatio, right = bbox.left + bbox.width;
  const labels = [], ticks = {}; // the last one of each kind
  ctx.save();
  ctx.lineWidth = ratio;
  ctx.font = `${11 * ratio}px system-ui, "DejaVu Sans", sans-serif`;
  Object.assign(ctx, { textBaseline: "top", textAlign: "left" });
  for (const mark of marks) {
    const x = Math.round(plot.valToPos(mark.x, "x", true)) + 0.5, isLine = WITH_LINES.has(mark.kind);
    if (x < bbox.left || x > right) continue;
    if (!isLine && x - ticks[mark.kind] < 5 * ratio) continue;
    ticks[mark.kind] = x;
    ctx.strokeStyle = palette[mark.kind] + (isLine ? "b0" : "ff");
    ctx.setLineDash(mark.kind === "resume" ? [3 * ratio, 3 * ratio] : []);
    ctx.beginPath();
    ctx.moveTo(x, isLine ? bbox.top : bbox.top + bbox.height - 7 * ratio);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    if (chart.wide && LABELLED.has(mark.kind))
      labels.push({ x, text: mark.kind === "fault" ? "fault" : mark.text.split(":")[0], color: palette[mark.kind] });
  }
  drawLabels(plot, labels.sort((a, b) => a.x - b.x)); // over all lines
  ctx.restore();
}

/** From left to right, in three rows. */
function drawLabels({ ctx, bbox, width }, labels) {
  const ratio = uPlot.pxRatio, ends = [], drawn = new Set(); // ends: of the labels in each row
  ctx.setLineDash([]);
  for (const { x, text: whole, color } of labels) {
    const text = whole.slice(0, width < 600 ? 16 : 30), wide = ctx.measureText(text).width;
    const row = [0, 1, 2].find((row) => (ends[row] ?? -1) < x);
    if (row === undefined || x + wide + 8 * ratio > bbox.left + bbox.width) continue;
    if (drawn.has(x + text)) continue;
    drawn.add(x + text);
    ends[row] = x + wide + 10 * ratio;
    Object.assign(ctx, { strokeStyle: palette.card, lineWidth: 4 * ratio, fillStyle: color });
    const y = bbox.top + (3 + 14 * row) * ratio;
    ctx.strokeText(text, x + 4 * ratio, y);
    ctx.fillText(text, x + 4 * ratio, y);
  }
}

function showTip(plot) {
  const { left } = plot.cursor, near = left < 0 ? [] :
    plot.marks.filter((mark) => Math.abs(plot.valToPos(mark.x, "x") - left) <= 5).slice(0, 5);
  plot.tip?.remove();
  if (!near.length) return;
  const runOf = (mark) => (content.runs.length > 1 ? `${content.runs[mark.number].name}, ` : "");
  const lines = near.map((mark) => node("p", {}, dot(mark.kind), node("b", {}, `${runOf(mark)}step ${mark.step} `),
    mark.text.length > 130 ? `${mark.text.slice(0, 130)} …` : mark.text));
  plot.tip = node("div", { class: "tip" }, ...lines);
  plot.over.append(plot.tip);
  const room = plot.over.clientWidth - plot.tip.offsetWidth;
  plot.tip.style.left = `${Math.max(0, Math.min(room, left + 12))}px`;
  plot.tip.style.top = "8px";
}

/* a chart in its card */

function draw(chart, card) {
  const log = (view.logs[chart.name] ??= chart.log), styles = styleOf(chart), key = keyOf(chart, styles);
  const place = node("div", { class: "plot" }), height = chart.wide ? 320 : 210;
  const unit = chart.unit && chart.by_step ? `, ${chart.unit}` : "";
  const toggle = node("button", { "aria-pressed": String(log), title: "logarithmic",
    onclick: () => { view.logs[chart.name] = !log; redraw(chart, card); } }, "log");
  const canLog = chart.by_step && !chart.curves.some((curve) => curve.role === "area");
  card.replaceChildren(...(canLog ? [toggle] : []), node("h3", {}, chart.title + unit), key.element, place,
    ...(chart.note ? [node("p", { class: "note" }, chart.note)] : []));
  const { x: lefts } = chart.curves[0], edges = [lefts[0], 2 * lefts.at(-1) - (lefts.at(-2) ?? 0)];
  const font = '11px system-ui, "DejaVu Sans", sans-serif';
  const axis = { font, labelFont: font, stroke: () => palette.muted, ticks: { show: false }, values: (_, xs) => xs.map(short) };
  const grid = { stroke: () => palette.grid, width: 1 };
  const bands = chart.curves.flatMap((curve, i) => (curve.role === "area" && i ? [{ series: [i + 1, i] }] : []));
  const plot = new uPlot({
    width: place.clientWidth, height, bands, legend: { show: false }, padding: [10, 12, 0, 0],
    scales: {
      x: { time: false, range: () => (chart.by_step ? view.zoom ?? view.full : edges) },
      y: log ? { distr: 3 } : { range: (_, low, high) => uPlot.rangeNum(chart.curves[0].role.match(/area|bars/) ? 0 : low, high, 0.1, true) },
    },
    axes: [
      { ...axis, grid: { show: false }, label: chart.by_step ? view.unit[0] : "s", labelSize: 15, labelGap: 0, size: 24, gap: 3, space: 70 },
      { ...axis, grid, size: 46, gap: 4, values: (_, ys) => ys.map((y) => (y == null ? "" : short(y))) },
    ],
    series: [{}, ...chart.curves.map((curve, i) => seriesOf(curve, styles[i], log))],
    cursor: {
      y: false, sync: chart.by_step ? { key: "x", scales: ["x", null] } : undefined,
      drag: { x: chart.by_step, setScale: false }, points: { size: 7 },
      bind: { dblclick: () => () => zoomTo(null) },
    },
    hooks: {
      draw: [(u) => u.marks && drawMarks(u)],
      setCursor: [(u) => { if (u.key) { showValues(u); if (u.over.matches(":hover")) showTip(u); else u.tip?.remove(); } }],
      setSelect: [(u) => {
        const { left, width } = u.select;
        if (width < 4) return;
        const range = [u.posToVal(left, "x"), u.posToVal(left + width, "x")];
        u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
        zoomTo(range);
      }],
    },
  }, dataOf(chart), place);
  Object.assign(plot, { chart, card, key, marks: marksOf(chart) });
  plot.redraw();
  showValues(plot);
  new ResizeObserver(() => plot.width !== place.clientWidth && plot.setSize({ width: place.clientWidth, height })).observe(place);
  return plot;
}

function redraw(chart, card) {
  const number = plots.findIndex((plot) => plot.card === card);
  plots[number].destroy();
  plots[number] = draw(chart, card);
}

function drawAll() {
  findRange();
  plots.forEach((plot) => plot.destroy());
  plots = content.charts.map((chart) => draw(chart, document.getElementById(`chart-${chart.name}`)));
}
