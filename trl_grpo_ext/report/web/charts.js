"use strict";
// Draws the charts: every text goes into the page as text, never as markup.
const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { top: 26, right: 14, bottom: 40, left: 12 };
const MAX_MARKS = 60; // points that are few enough for a dot or a bar each
const NUM_COLOURS = 8;

function make(parent, name, attributes = {}, text = null) {
  const element = document.createElement(name);
  return added(parent, element, attributes, text);
}

function makeSvg(parent, name, attributes = {}, text = null) {
  return added(parent, document.createElementNS(SVG, name), attributes, text);
}

function added(parent, element, attributes, text) {
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== null) element.textContent = shown(text);
  if (parent) parent.append(element);
  return element;
}

// Control characters and those that turn the writing direction, spelt out.
const HIDDEN = /[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]|\p{Cs}/gu;
function shown(text) {
  return String(text).replace(HIDDEN, (sign) => {
    const code = sign.charCodeAt(0).toString(16);
    return code.length <= 2 ? `\\x${code.padStart(2, "0")}` : `\\u${code.padStart(4, "0")}`;
  });
}

function number(value, unit = "") {
  if (value === null || value === undefined) return "–";
  if (unit === "share") return `${Number((100 * value).toPrecision(3))}%`;
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  return Number(value.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 });
}

function colour(index) {
  return `c${index % NUM_COLOURS}${index >= NUM_COLOURS ? " dashed" : ""}`;
}

function finite(values) {
  return (values || []).filter((value) => value !== null);
}

function niceStep(span, count) {
  const rough = span / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= rough * 0.999);
}

function ticks(low, high, count, whole = false) {
  let step = niceStep(high - low, count);
  if (whole) step = Math.max(1, Math.round(step));
  const first = Math.ceil(low / step - 1e-9);
  const found = [];
  for (let place = first; place * step <= high + step * 1e-6; place++) found.push(place * step + 0);
  return found;
}

function range(spec) {
  const areas = spec.lines.filter((line) => line.style === "area");
  const tops = areas.length ? areas[0].x.map((_, i) => areas.reduce((sum, l) => sum + (l.y[i] || 0), 0)) : [];
  const values = spec.lines.flatMap((line) => [line.y, line.low, line.high].flatMap(finite));
  values.push(...tops, ...spec.levels.map((level) => level.value));
  let [low, high] = values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
  if (spec.zero) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
  if (low === high) [low, high] = spec.zero && low === 0 ? [0, 1] : [low - Math.abs(low) / 10 - 1e-9, high + Math.abs(high) / 10 + 1e-9];
  const room = (high - low) * 0.06;
  if (!(spec.zero && low === 0)) low -= room;
  high += room;
  return spec.unit === "share" ? [Math.max(low, 0), Math.min(high, 1)] : [low, high];
}

function stepRange(spec) {
  const steps = spec.lines.flatMap((line) => line.x);
  const low = steps.reduce((a, b) => Math.min(a, b), Infinity);
  const high = steps.reduce((a, b) => Math.max(a, b), -Infinity);
  const room = Math.max(0.5, (high - low) * 0.015);
  return [low - room, high + room];
}

function drawChart(figure, spec) {
  const plot = figure.querySelector(".plot");
  const [width, height] = [Math.max(plot.clientWidth, 240), plot.clientWidth < 420 ? 220 : 260];
  const [low, high] = range(spec);
  const [first, last] = stepRange(spec);
  const marks = ticks(low, high, 5);
  const left = MARGIN.left + 7 * Math.max(...marks.map((mark) => number(mark, spec.unit).length));
  const scale = {
    left, right: width - MARGIN.right, top: MARGIN.top, bottom: height - MARGIN.bottom,
    x: (step) => left + ((step - first) / (last - first)) * (width - MARGIN.right - left),
    y: (value) => height - MARGIN.bottom - ((value - low) / (high - low)) * (height - MARGIN.bottom - MARGIN.top),
    step: (x) => first + ((x - left) / (width - MARGIN.right - left)) * (last - first),
  };
  plot.replaceChildren();
  const names = spec.lines.map((line) => line.name).join(", ");
  const svg = makeSvg(plot, "svg", {
    viewBox: `0 0 ${width} ${height}`, width, height, role: "img", tabindex: "0",
    "aria-label": shown(`${spec.title}: ${names}. The values are in the table below.`),
  });
  drawAxes(svg, spec, scale, marks, ticks(first, last, Math.min(8, width / 70), true));
  if (spec.lines.some((line) => line.style === "area")) drawStack(svg, spec.lines, scale);
  for (const line of spec.lines) if (line.style !== "area") drawBand(svg, line, scale);
  for (const level of spec.levels) {
    makeSvg(svg, "line", { class: `level ${colour(level.colour)}`, x1: left, x2: scale.right, y1: scale.y(level.value), y2: scale.y(level.value) });
  }
  for (const line of spec.lines) {
    if (line.style === "line") drawLine(svg, line, scale);
    if (line.style === "points") drawPoints(svg, line, scale, spec);
  }
  addCursor(plot, svg, spec, scale);
}

function drawAxes(svg, spec, scale, marks, steps) {
  for (const mark of marks) {
    makeSvg(svg, "line", { class: "grid-line", x1: scale.left, x2: scale.right, y1: scale.y(mark), y2: scale.y(mark) });
    makeSvg(svg, "text", { x: scale.left - 6, y: scale.y(mark) + 4, "text-anchor": "end" }, number(mark, spec.unit));
  }
  for (const step of steps) {
    makeSvg(svg, "line", { class: "axis", x1: scale.x(step), x2: scale.x(step), y1: scale.bottom, y2: scale.bottom + 4 });
    makeSvg(svg, "text", { x: scale.x(step), y: scale.bottom + 17, "text-anchor": "middle" }, step.toLocaleString("en"));
  }
  makeSvg(svg, "line", { class: "axis", x1: scale.left, x2: scale.right, y1: scale.bottom, y2: scale.bottom });
  makeSvg(svg, "text", { class: "label", x: scale.right, y: scale.bottom + 33, "text-anchor": "end" }, "optimizer step");
  makeSvg(svg, "text", { class: "label", x: 0, y: 13 }, spec.unit === "share" ? "share (%)" : spec.unit);
}

// Stretches of neighbours that have all of these values.
function stretches(...columns) {
  const found = [[]];
  columns[0].forEach((_, index) => {
    if (columns.every((column) => column[index] !== null)) found[found.length - 1].push(index);
    else if (found[found.length - 1].length) found.push([]);
  });
  return found.filter((stretch) => stretch.length);
}

function path(indices, xs, ys, scale) {
  return indices.map((i, place) => `${place ? "L" : "M"}${scale.x(xs[i]).toFixed(1)},${scale.y(ys[i]).toFixed(1)}`).join("");
}

function drawBand(svg, line, scale) {
  if (!line.low || line.style === "points") return;
  for (const stretch of stretches(line.low, line.high)) {
    const back = path([...stretch].reverse(), line.x, line.low, scale).replace("M", "L");
    makeSvg(svg, "path", { class: `band ${colour(line.colour)}`, d: `${path(stretch, line.x, line.high, scale)}${back}Z` });
  }
}

function drawLine(svg, line, scale) {
  const group = makeSvg(svg, "g", { class: colour(line.colour) });
  for (const stretch of stretches(line.y)) {
    makeSvg(group, "path", { class: line.smooth ? "raw" : "curve", d: path(stretch, line.x, line.y, scale) });
    if (line.x.length > MAX_MARKS || line.smooth) continue;
    for (const i of stretch) makeSvg(group, "circle", { cx: scale.x(line.x[i]), cy: scale.y(line.y[i]), r: 2.6 });
  }
  if (!line.smooth) return;
  for (const stretch of stretches(line.smooth)) makeSvg(group, "path", { class: "curve", d: path(stretch, line.x, line.smooth, scale) });
}

function drawPoints(svg, line, scale, spec) {
  const group = makeSvg(svg, "g", { class: colour(line.colour) });
  for (const stretch of stretches(line.y)) {
    makeSvg(group, "path", { class: "raw", d: path(stretch, line.x, line.y, scale) });
    for (const i of stretch) {
      const [x, y] = [scale.x(line.x[i]), scale.y(line.y[i])];
      if (line.low && line.low[i] !== null) makeSvg(group, "path", { class: "error", d: `M${x},${scale.y(line.low[i])}V${scale.y(line.high[i])}` });
      makeSvg(group, "circle", { cx: x, cy: y, r: 5 });
      if (spec.lines.length > 2) continue;
      const atEnd = x > (scale.left + scale.right) / 2;
      makeSvg(svg, "text", { class: "value", x: x + (atEnd ? -10 : 10), y: y + 4, "text-anchor": atEnd ? "end" : "start" }, number(line.y[i], spec.unit));
    }
  }
}

function drawStack(svg, lines, scale) {
  const steps = lines[0].x;
  const gaps = steps.slice(1).map((step, i) => step - steps[i]);
  const wide = 0.8 * Math.abs(scale.x(gaps.length ? Math.min(...gaps) : 1) - scale.x(0));
  let below = steps.map(() => 0);
  for (const line of lines) {
    const above = below.map((value, i) => value + (line.y[i] || 0));
    const group = makeSvg(svg, "g", { class: `area ${colour(line.colour)}` });
    if (steps.length <= MAX_MARKS) {
      steps.forEach((step, i) => makeSvg(group, "rect", {
        x: scale.x(step) - wide / 2, width: wide, y: scale.y(above[i]), height: Math.max(scale.y(below[i]) - scale.y(above[i]), 0),
      }));
    } else {
      const indices = steps.map((_, i) => i);
      const back = path([...indices].reverse(), steps, below, scale).replace("M", "L");
      makeSvg(group, "path", { d: `${path(indices, steps, above, scale)}${back}Z` });
    }
    below = above;
  }
}

// A vertical line and a box with the values of a step: under the pointer, or moved with the arrow keys.
function addCursor(plot, svg, spec, scale) {
  const steps = [...new Set(spec.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  const cursor = makeSvg(svg, "line", { class: "cursor", y1: scale.top, y2: scale.bottom, visibility: "hidden" });
  const tip = make(plot, "div", { class: "tip", hidden: "", "aria-live": "polite" });
  let at = -1;
  const show = (index) => {
    at = Math.min(Math.max(index, 0), steps.length - 1);
    const x = scale.x(steps[at]);
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, x);
    cursor.setAttribute("visibility", "visible");
    tip.replaceChildren();
    make(tip, "b", {}, `step ${steps[at].toLocaleString("en")}`);
    for (const line of spec.lines) {
      const place = line.x.indexOf(steps[at]);
      if (place < 0) continue;
      const row = make(tip, "div");
      make(row, "i", { class: `swatch ${colour(line.colour)}` });
      const band = line.low && line.low[place] !== null ? ` (${number(line.low[place], spec.unit)} to ${number(line.high[place], spec.unit)})` : "";
      make(row, "span", {}, `${line.name}: ${number(line.y[place], spec.unit)}${band}`);
    }
    tip.hidden = false;
    tip.style.left = `${Math.max(0, Math.min(x + 12, plot.clientWidth - tip.offsetWidth))}px`;
  };
  const hide = () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); };
  svg.addEventListener("pointermove", (event) => {
    const step = scale.step(event.clientX - svg.getBoundingClientRect().left);
    show(steps.reduce((best, one, i) => (Math.abs(one - step) < Math.abs(steps[best] - step) ? i : best), 0));
  });
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move) { show(at + move); event.preventDefault(); }
    if (event.key === "Escape") hide();
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
}

function drawLegend(figure, spec, always) {
  const legend = figure.querySelector(".legend");
  const entries = [...spec.lines, ...spec.levels.map((level) => ({ ...level, style: "dash" }))];
  if (entries.length < 2 && !always) return;
  for (const entry of entries) {
    const item = make(legend, "span");
    make(item, "i", { class: `swatch ${entry.style} ${colour(entry.colour)}` });
    make(item, "span", {}, entry.name);
  }
}

// All values as a table, written when it is opened.
function addValues(figure, spec) {
  const details = make(figure.querySelector("figcaption"), "details");
  make(details, "summary", {}, "Table of values");
  details.addEventListener("toggle", () => {
    if (!details.open || details.querySelector("table")) return;
    const table = make(make(details, "div", { class: "scroll", tabindex: "0" }), "table");
    const head = make(make(table, "thead"), "tr");
    for (const name of ["step", ...spec.lines.map((line) => line.name)]) make(head, "th", { scope: "col" }, name);
    const body = make(table, "tbody");
    const places = spec.lines.map((line) => new Map(line.x.map((step, i) => [step, i])));
    for (const step of [...new Set(spec.lines.flatMap((line) => line.x))].sort((a, b) => a - b)) {
      const row = make(body, "tr");
      make(row, "th", { scope: "row" }, step);
      spec.lines.forEach((line, n) => make(row, "td", {}, number(line.y[places[n].get(step)], spec.unit)));
    }
  });
}

function drawBars(box, rows) {
  for (const [name, share, low, high] of rows) {
    const row = make(box, "div", { class: "bar-row" });
    make(row, "span", { class: "bar-name" }, name);
    const svg = makeSvg(row, "svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", role: "img", "aria-label": shown(`${name}: ${number(share, "share")}`) });
    makeSvg(svg, "rect", { class: "bar-back", x: 0, y: 0, width: 100, height: 10 });
    makeSvg(svg, "rect", { class: "bar c0", x: 0, y: 0, width: 100 * share, height: 10 });
    if (low !== null) makeSvg(svg, "path", { class: "bar-error", d: `M${100 * low},5H${100 * high}M${100 * low},2.5V7.5M${100 * high},2.5V7.5` });
    make(row, "b", {}, number(share, "share"));
  }
}
