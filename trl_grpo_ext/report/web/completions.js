// The browser of completions: a step, an order, a filter.
const MAX_SHOWN = 60; // completions at once

function addBrowser(box, runs) {
  const state = { run: 0, place: runs[0].steps.length - 1, order: "", words: "", most: MAX_SHOWN };
  const bar = make(box, "div", { class: "controls" });
  const runSelect = runs.length > 1 ? addSelect(bar, "Run", runs.map((run, i) => [String(i), run.run])) : null;
  const stepper = addStepper(bar);
  const orderSelect = addSelect(bar, "Order", []);
  const filter = make(make(bar, "label", {}, "Containing "), "input", { type: "search", placeholder: "any text" });
  const status = make(box, "p", { class: "status", role: "status" });
  const list = make(box, "div");

  const steps = () => runs[state.run].steps;
  const update = () => {
    const step = steps()[state.place];
    stepper.show(steps(), state.place);
    fillOrders(orderSelect, step, state);
    showStep(list, status, step, state, () => { state.most += MAX_SHOWN; update(); });
  };
  const change = (changes) => { Object.assign(state, { most: MAX_SHOWN }, changes); update(); };
  if (runSelect) runSelect.addEventListener("change", () => {
    const run = Number(runSelect.value);
    change({ run, place: runs[run].steps.length - 1 });
  });
  stepper.listen((place) => change({ place: Math.min(Math.max(place, 0), steps().length - 1) }));
  orderSelect.addEventListener("change", () => change({ order: orderSelect.value }));
  filter.addEventListener("input", () => change({ words: filter.value.toLowerCase() }));
  update();
}

function addSelect(parent, title, options) {
  const select = make(make(parent, "label", {}, `${title} `), "select");
  for (const [value, name] of options) make(select, "option", { value }, name);
  return select;
}

function addStepper(parent) {
  const box = make(parent, "div", { class: "stepper" });
  const back = make(box, "button", { type: "button", "aria-label": "earlier step" }, "◀");
  const label = make(box, "label", {}, "");
  const name = make(label, "span");
  const slider = make(label, "input", { type: "range", min: "0", step: "1" });
  const on = make(box, "button", { type: "button", "aria-label": "later step" }, "▶");
  let at = 0;
  return {
    show(steps, place) {
      at = place;
      slider.max = String(steps.length - 1);
      slider.value = String(place);
      slider.disabled = steps.length < 2;
      slider.setAttribute("aria-valuetext", `step ${steps[place].step}`);
      name.textContent = `Step ${steps[place].step}`;
      back.disabled = place === 0;
      on.disabled = place === steps.length - 1;
    },
    listen(choose) {
      back.addEventListener("click", () => choose(at - 1));
      on.addEventListener("click", () => choose(at + 1));
      slider.addEventListener("input", () => choose(Number(slider.value)));
    },
  };
}

function fillOrders(select, step, state) {
  const names = [...step.columns].reverse(); // the advantage comes last in the log
  const options = [["", "as sampled"]];
  names.forEach((name) => options.push([`${name}:high`, `${name}, high first`], [`${name}:low`, `${name}, low first`]));
  if (!options.some(([value]) => value === state.order)) state.order = "";
  select.replaceChildren();
  for (const [value, name] of options) make(select, "option", { value }, name);
  select.value = state.order;
}

// Groups as [group, rows], ordered and filtered; a group goes where its first row would.
function chosen(step, state) {
  const end = state.order.lastIndexOf(":");
  const column = step.columns.indexOf(state.order.slice(0, end));
  const sign = state.order.endsWith(":high") ? -1 : 1;
  const value = (group, row) => {
    const score = group.scores[row][column];
    return score === null || score === undefined ? Infinity : sign * score;
  };
  const found = [];
  for (const group of step.groups) {
    const prompt = group.prompt.map(([, text]) => text).join("\n").toLowerCase();
    const rows = group.texts.map((_, row) => row)
      .filter((row) => !state.words || prompt.includes(state.words) || group.texts[row].toLowerCase().includes(state.words));
    if (column >= 0) rows.sort((a, b) => value(group, a) - value(group, b) || 0);
    if (rows.length) found.push([group, rows]);
  }
  if (column >= 0) found.sort(([a, [i]], [b, [j]]) => value(a, i) - value(b, j) || 0);
  return found;
}

function showStep(list, status, step, state, more) {
  const found = chosen(step, state);
  const total = found.reduce((sum, [, rows]) => sum + rows.length, 0);
  status.textContent = `${found.length} ${found.length === 1 ? "prompt" : "prompts"}, ${total} ${total === 1 ? "completion" : "completions"}${state.words ? " with this text" : ""}.`;
  list.replaceChildren();
  const scale = Math.max(...step.groups.flatMap((g) => g.scores.map((s) => Math.abs(s[step.columns.indexOf("advantage")] || 0))), 1e-9);
  let left = state.most;
  for (const [group, rows] of found) {
    if (left <= 0) break;
    showGroup(list, step, group, rows.slice(0, left), scale);
    left -= rows.length;
  }
  if (total > state.most) make(list, "button", { type: "button", class: "more" }, `Show more (${total - state.most} left)`).addEventListener("click", more);
}

function showGroup(list, step, group, rows, scale) {
  const card = make(list, "article", { class: "group" });
  const prompt = make(card, "div", { class: "prompt" });
  make(prompt, "h3", {}, "Prompt");
  for (const [role, text] of group.prompt) {
    const message = make(prompt, "div", { class: "message" });
    if (role) make(message, "b", {}, role);
    addText(message, text);
  }
  for (const row of rows) {
    const one = make(card, "div", { class: "completion" });
    const scores = make(one, "dl");
    step.columns.forEach((name, n) => addScore(scores, name, group.scores[row][n], scale));
    addText(one, group.texts[row]);
    step.extras.forEach((name, n) => make(one, "p", { class: "extra" }, `${name}: ${group.extras[row][n]}`));
  }
}

function addText(parent, text) {
  make(parent, "pre", { dir: "auto", tabindex: "0", class: text ? "" : "empty" }, text || "(empty)");
}

function addScore(parent, name, value, scale) {
  const isAdvantage = name === "advantage";
  const box = make(parent, "div", { class: isAdvantage ? "advantage" : "" });
  make(box, "dt", {}, name);
  const sign = isAdvantage && value > 0 ? "+" : "";
  make(box, "dd", {}, value === null ? "no score" : `${sign}${number(value)}`);
  if (!isAdvantage || value === null) return;
  const svg = makeSvg(box, "svg", { viewBox: "-50 0 100 6", preserveAspectRatio: "none", "aria-hidden": "true" });
  const width = (50 * Math.abs(value)) / scale;
  makeSvg(svg, "rect", { class: "bar-back", x: -50, y: 0, width: 100, height: 6 });
  makeSvg(svg, "rect", { class: value < 0 ? "worse" : "better", x: value < 0 ? -width : 0, y: 0, width, height: 6 });
}
