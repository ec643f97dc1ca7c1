// The JSON of page_data.py -> filters, a table in pages, charts, and two rows compared.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const ROWS_A_PAGE = window.innerWidth < 736 ? 6 : 25;
const MAX_POINTS = 3000;
const SHAPES = ["circle", "square", "triangle", "diamond", "cross", "ring"];
const state = { filter: {}, sort: null, down: false, page: 0, pair: [] };

const FILTERS = [
  ["machine", "Device", (row) => data.machines[row.machine], false],
  ["scope", "Scope", (row) => data.scopes[row.scope], false],
  ["scenario", "Scenario", (row) => tableOf(row).title, false],
  ["network", "Network", (row) => row.network, true],
  ["runtime", "Runtime", (row) => row.runtime, true],
  ["precision", "Precision", (row) => row.precision, true],
];

function tableOf(row) {
  return data.tables.find((t) => t.machine === row.machine && t.scenario === row.scenario);
}

function element(tag, attributes = {}, ...children) {
  const isSvg = ["svg", "g", "path", "line", "text", "title", "rect"].includes(tag);
  const made = isSvg
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

const at = (id) => document.getElementById(id);
const nameOf = (row) => `${row.network} ${row.runtime} ${row.precision}`;
const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}\u00a0%`;

function number(value) {
  if (value === null || value === undefined) return "–";
  return value >= 100 ? Math.round(value).toLocaleString("en") : Number(value.toPrecision(3)) + "";
}

// What is shown: one device, scope and scenario at a time, so that only like stands beside like.

function shownRows() {
  return data.rows.filter((row) =>
    Object.entries(state.filter).every(([key, value]) => value === "" || String(row[key]) === value),
  );
}

function isAllowed(row, key) {
  // By the choices above this one.
  for (const [other] of FILTERS) {
    if (other === key) return true;
    const value = state.filter[other];
    if (value !== "" && String(row[other]) !== value) return false;
  }
  return true;
}

function fillFilters() {
  const form = at("filters");
  form.replaceChildren();
  for (const [key, label, text, hasAll] of FILTERS) {
    const options = new Map();
    for (const row of data.rows) if (isAllowed(row, key)) options.set(String(row[key]), text(row));
    if (state.filter[key] !== "" && !options.has(state.filter[key]))
      state.filter[key] = hasAll ? "" : options.keys().next().value;
    const select = element("select", {
      id: `filter-${key}`,
      onchange: (event) => {
        state.filter[key] = event.target.value;
        state.page = 0;
        render();
        at(`filter-${key}`).focus();
      },
    });
    if (hasAll) select.append(element("option", { value: "" }, "all"));
    for (const [value, name] of options)
      select.append(element("option", { value, selected: value === state.filter[key] }, name));
    form.append(element("label", {}, label, select));
  }
  const rows = shownRows();
  const order = element(
    "select",
    {
      id: "order",
      onchange: (event) => {
        [state.sort, state.down] = JSON.parse(event.target.value);
        state.page = 0;
        render();
        at("order").focus();
      },
    },
    element("option", { value: "[null,false]" }, "network, then speed"),
    ...tableOf(rows[0]).columns.flatMap((column, index) =>
      [false, true].map((down) =>
        element(
          "option",
          { value: `[${index},${down}]`, selected: state.sort === index && state.down === down },
          `${column} ${down ? "↓" : "↑"}`,
        ),
      ),
    ),
  );
  form.append(element("label", {}, "Order", order));
}

// The table.

function sortKey(row, index) {
  const text = row.cells[index].replaceAll(",", "");
  const value = parseFloat(text);
  return Number.isNaN(value) ? text : value;
}

function sorted(rows) {
  if (state.sort === null) return rows;
  const keyed = rows.map((row) => [sortKey(row, state.sort), row]);
  // What is no number comes last, either way.
  keyed.sort(([a], [b]) => {
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return (a < b ? -1 : a > b ? 1 : 0) * (state.down ? -1 : 1);
  });
  return keyed.map(([, row]) => row);
}

function fillTable(rows) {
  const table = tableOf(rows[0]);
  const pages = Math.ceil(rows.length / ROWS_A_PAGE);
  state.page = Math.min(state.page, pages - 1);
  const first = state.page * ROWS_A_PAGE;
  const visible = sorted(rows).slice(first, first + ROWS_A_PAGE);
  const kind = (column) => (table.words.includes(column) ? "word" : null);
  const head = table.columns.map((column, index) =>
    element(
      "th",
      {
        class: kind(column),
        "aria-sort": state.sort === index ? (state.down ? "descending" : "ascending") : null,
      },
      element(
        "button",
        {
          type: "button",
          "data-column": index,
          onclick: () => {
            state.down = state.sort === index && !state.down;
            state.sort = index;
            render();
            document.querySelector(`[data-column="${index}"]`).focus();
          },
        },
        column + (state.sort === index ? (state.down ? " ↓" : " ↑") : ""),
      ),
    ),
  );
  const body = visible.map((row) => {
    const id = data.rows.indexOf(row);
    const place = state.pair.indexOf(row);
    return element(
      "tr",
      { class: place < 0 ? null : `chosen-${"ab"[place]}` },
      element(
        "td",
        { class: "word", "data-title": "compare" },
        element("input", {
          type: "checkbox",
          id: `row-${id}`,
          checked: place >= 0,
          "aria-label": `compare ${nameOf(row)}`,
          onchange: () => {
            choose(row);
            at(`row-${id}`)?.focus();
          },
        }),
        place < 0 ? "" : " " + "AB"[place],
      ),
      ...row.cells.map((cell, index) =>
        element("td", { class: kind(table.columns[index]), "data-title": table.columns[index] }, cell),
      ),
    );
  });
  at("table").replaceChildren(
    element("thead", {}, element("tr", {}, element("th", { class: "word" }, "compare"), ...head)),
    element("tbody", {}, ...body),
  );
  const marks = new Set(visible.flatMap((row) => row.cells).join(" ").match(/\([a-z]{1,2}\)/g));
  at("notes").replaceChildren(
    ...table.notes
      .filter((note) => marks.has(note.split(" ")[0]))
      .map((note) => element("p", { class: "note" }, note)),
  );
  const turn = (step, label) =>
    element(
      "button",
      {
        type: "button",
        id: `page-${label}`,
        disabled: state.page + step < 0 || state.page + step >= pages,
        onclick: () => {
          state.page += step;
          render();
          (at(`page-${label}`).disabled ? at("pager").querySelector("button:enabled") : at(`page-${label}`)).focus();
        },
      },
      label,
    );
  const last = Math.min(first + ROWS_A_PAGE, rows.length);
  at("pager").replaceChildren(
    ...(pages > 1 ? [turn(-1, "Previous"), turn(1, "Next")] : []),
    element("span", { role: "status" }, `rows ${first + 1} to ${last} of ${rows.length.toLocaleString("en")}`),
  );
}

function choose(row) {
  const place = state.pair.indexOf(row);
  if (place >= 0) state.pair.splice(place, 1);
  else state.pair = [...state.pair.slice(-1), row];
  render();
}

// Charts: SVG in the colors of the page, as wide as there is room.

function scale(values, isLog, from, to) {
  let low = Math.min(...values), high = Math.max(...values);
  if (isLog) {
    low = Math.log10(low) - 0.05;
    high = Math.log10(high) + 0.05;
  } else {
    const room = (high - low || Math.abs(high) || 1) * 0.08;
    low -= room;
    high += room;
  }
  const place = (v) => from + ((to - from) * ((isLog ? Math.log10(v) : v) - low)) / (high - low);
  return { place, ticks: ticks(low, high, isLog) };
}

function ticks(low, high, isLog) {
  if (isLog) {
    const all = [];
    for (let e = Math.floor(low); e <= high; e++)
      for (const m of [1, 1.5, 2, 3, 5, 7]) all.push(m * 10 ** e);
    const inside = all.filter((v) => Math.log10(v) >= low && Math.log10(v) <= high);
    return inside.filter((_, i) => i % Math.ceil(inside.length / 6) === 0);
  }
  const rough = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const all = [];
  for (let v = Math.ceil(low / step) * step; v <= high; v += step) all.push(Number(v.toPrecision(9)));
  return all;
}

function mark(shape, x, y, r) {
  const paths = {
    circle: `M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0`,
    square: `M${x - r},${y - r}h${2 * r}v${2 * r}h${-2 * r}z`,
    triangle: `M${x},${y - r * 1.2}l${r * 1.1},${r * 2}h${-2.2 * r}z`,
    diamond: `M${x},${y - r * 1.3}l${r * 1.3},${r * 1.3}l${-r * 1.3},${r * 1.3}l${-r * 1.3},${-r * 1.3}z`,
    cross: `M${x - r},${y - r / 3}h${r * 0.67}v${-r * 0.67}h${r * 0.67}v${r * 0.67}h${r * 0.67}v${r * 0.67}h${-r * 0.67}v${r * 0.67}h${-r * 0.67}v${-r * 0.67}h${-r * 0.67}z`,
  };
  paths.ring = paths.circle + `M${x - r / 2},${y}a${r / 2},${r / 2} 0 1,1 ${r},0a${r / 2},${r / 2} 0 1,1 ${-r},0`;
  return paths[shape];
}

function chart(place, { label, xLabel, yLabel, isLogX, isLogY, series, xTicks }) {
  const box = at(place);
  const width = Math.max(280, box.clientWidth), height = Math.min(340, 150 + width / 3.5);
  const points = series.flatMap((one) => one.points);
  if (points.length === 0) return box.replaceChildren();
  const left = 52, bottom = height - 42;
  const x = scale(points.map((p) => p.x), isLogX, left, width - 14);
  const y = scale(points.flatMap((p) => [p.y, p.low ?? p.y, p.high ?? p.y]), isLogY, bottom, 12);
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  for (const v of y.ticks) {
    svg.append(element("line", { class: "grid", x1: left, x2: width - 8, y1: y.place(v), y2: y.place(v) }));
    svg.append(element("text", { x: left - 6, y: y.place(v) + 4, "text-anchor": "end" }, Number(v.toPrecision(4)) + ""));
  }
  const named = xTicks ?? x.ticks.map((v) => [v, Number(v.toPrecision(4)) + ""]);
  for (const [v, text] of named)
    svg.append(element("text", { x: x.place(v), y: bottom + 16, "text-anchor": "middle" }, text));
  svg.append(element("text", { x: width - 8, y: height - 6, "text-anchor": "end" }, xLabel));
  svg.append(element("text", { x: 2, y: 8, "dominant-baseline": "middle" }, yLabel));
  for (const one of series) {
    const put = one.points.map((p) => [x.place(p.x), y.place(p.y)]);
    if (one.line && put.length > 1) {
      const path = put.map(([px, py], i) =>
        i === 0 ? `M${px},${py}` : one.line === "step" ? `H${px}V${py}` : `L${px},${py}`,
      );
      svg.append(element("path", { class: `line ${one.style}`, d: path.join("") }));
    }
    if (!one.shape) continue;
    one.points.forEach((p, i) => {
      const [px, py] = put[i];
      if (p.low !== undefined && one.points.length <= 60)
        svg.append(element("line", { class: "error", x1: px, x2: px, y1: y.place(p.low), y2: y.place(p.high) }));
      const dot = element("path", { class: `mark ${one.style}`, d: mark(one.shape, px, py, p.r ?? 5) });
      if (p.title) dot.append(element("title", {}, p.title));
      if (p.row) dot.addEventListener("click", () => choose(p.row));
      svg.append(dot);
      if (p.text)
        svg.append(
          element(
            "text",
            { class: "name", x: px > width - 140 ? px - 12 : px + 12, y: py + (p.below ? 16 : -8), "text-anchor": px > width - 140 ? "end" : "start" },
            p.text,
          ),
        );
    });
  }
  const legend = element("p", { class: "legend" });
  for (const one of series)
    if (one.name) {
      const key = element("svg", { viewBox: "0 0 14 14", width: 14, height: 14, "aria-hidden": "true" });
      if (one.line) key.append(element("path", { class: `line ${one.style}`, d: "M0,7H14" }));
      if (one.shape) key.append(element("path", { class: `mark ${one.style}`, d: mark(one.shape, 7, 7, 4.5) }));
      legend.append(element("span", {}, key, " " + one.name));
    }
  box.replaceChildren(svg, legend);
}

function front(rows, value, isTime) {
  // Best first: nothing after it is as fast and as accurate.
  const order = [...rows].sort((a, b) => (isTime ? 1 : -1) * (value(a) - value(b)) || b.top1 - a.top1);
  let best = -1;
  return order.filter((row) => row.top1 > best && ((best = row.top1), true));
}

function drawTradeoff(rows) {
  const { isTime, where, scenario } = tableOf(rows[0]);
  const value = (row) => (isTime ? row.p50 : row.rate);
  const drawn = rows.filter((row) => value(row) > 0);
  const best = front(drawn, value, isTime);
  const few = drawn.length > MAX_POINTS ? drawn.filter((_, i) => i % Math.ceil(drawn.length / MAX_POINTS) === 0) : drawn;
  const runtimes = [...new Set(data.rows.map((row) => row.runtime))];
  const point = (row) => ({
    x: value(row), y: 100 * row.top1, low: 100 * row.low, high: 100 * row.high, row,
    r: few.length > 200 ? 2.5 : 5,
    title: `${nameOf(row)}: ${number(value(row))}, ${percent(row.top1)} (${percent(row.low)} to ${percent(row.high)})`,
  });
  const series = [
    { name: "Pareto front", style: "front", line: "step",
      points: (isTime ? best : [...best].reverse()).map((row) => ({ x: value(row), y: 100 * row.top1 })) },
    ...runtimes
      .map((runtime, i) => ({
        name: runtime, style: `color-${i % 6}`, shape: SHAPES[i % 6],
        points: few.filter((row) => row.runtime === runtime).map(point),
      }))
      .filter((one) => one.points.length),
    ...state.pair.flatMap((row, i) =>
      drawn.includes(row)
        ? [{ style: `pair-${"ab"[i]}`, shape: "circle", points: [{ ...point(row), r: 9, below: i === 1, text: "AB"[i] }] }]
        : [],
    ),
  ];
  if (scenario === "batch16")
    series.push({
      name: "the paper, V100 fp16: another device, ImageNet", style: "paper", shape: "diamond",
      points: data.paper.map((p) => ({ x: p.ms, y: p.top1, text: p.name, title: `${p.name}, the paper: ${p.ms} ms, ${p.top1} %` })),
    });
  chart("tradeoff", {
    label: "Speed against accuracy; the table has the same numbers",
    xLabel: isTime ? `p50 of a call ${where}, ms (log; left is better)` : `images/s ${where} (log; right is better)`,
    yLabel: "top-1, %; bars: 95 % interval", isLogX: true, series,
  });
  at("tradeoff-note").textContent =
    (few.length < drawn.length ? `${few.length.toLocaleString("en")} of ${drawn.length.toLocaleString("en")} points are drawn; the front is of all. ` : "") +
    (new Set(drawn.map((row) => row.data)).size > 1 ? "The accuracies are of different images, which do not compare. " : "");
}

function pairSeries(points, extra) {
  return state.pair.map((row, i) => ({ name: `${"AB"[i]}: ${nameOf(row)}`, style: `pair-line-${"ab"[i]}`, ...extra, points: points(row) }));
}

function drawPair() {
  chart("distribution", {
    label: "Distribution of samples", xLabel: "ms from call to answer (log)", yLabel: "% of calls within", isLogX: true,
    series: pairSeries((row) => row.quantiles.map((ms, i) => ({ x: ms, y: (100 * i) / (row.quantiles.length - 1) })), { line: "step" }),
  });
  const batches = (value) => (row) => {
    const own = data.rows.filter(
      (r) => r.program === row.program && r.runtime === row.runtime && r.machine === row.machine && r.scope === row.scope && r.threads === row.threads && r.scenario !== "server" && value(r) > 0,
    );
    const newest = new Map(own.map((r) => [r.batch, r]));
    return [...newest.values()].sort((a, b) => a.batch - b.batch).map((r) => ({ x: r.batch, y: value(r), title: `batch ${r.batch}: ${number(value(r))}` }));
  };
  const sizes = [...new Set(state.pair.flatMap((row) => batches((r) => r.rate)(row).map((p) => p.x)))];
  const xTicks = sizes.map((size) => [size, String(size)]);
  const both = { isLogX: true, isLogY: true, xLabel: "images in a call", xTicks };
  chart("batch-time", { ...both, label: "Time against batch", yLabel: "p50 of a call, ms (log)", series: pairSeries(batches((r) => r.p50), { line: "line", shape: "circle" }) });
  chart("batch-rate", { ...both, label: "Images a second against batch", yLabel: "images/s (log)", series: pairSeries(batches((r) => r.rate), { line: "line", shape: "circle" }) });
  drawHistory();
  drawLayers();
}

function drawHistory() {
  const lines = state.pair.map((row) =>
    data.history.find(
      (line) => line.machine === data.machines[row.machine] && line.scenario === row.scenario && line.network === row.network.replace(/ \([0-9a-f]{7}\),/, ",") && line.runtime === row.runtime && line.precision === row.precision && line.batch === row.batch && line.threads === row.threads,
    ),
  );
  const points = lines.flatMap((line) => (line ? line.points : [])).sort((a, b) => (a[1] < b[1] ? -1 : a[1] > b[1] ? 1 : 0));
  const commits = [...new Set(points.map((p) => p[0]))];
  at("history-box").hidden = commits.length < 2;
  if (commits.length < 2) return;
  const every = Math.ceil(commits.length / 8);
  chart("history", {
    label: "Median over commits", xLabel: "commit, oldest first", yLabel: "p50, ms",
    xTicks: commits.map((c, i) => [i, c.slice(0, 7)]).filter((_, i) => i % every === 0),
    series: pairSeries((row) => {
      const line = lines[state.pair.indexOf(row)];
      return line ? line.points.map(([commit, date, p50]) => ({ x: commits.indexOf(commit), y: p50, title: `${commit}, ${date}: ${number(p50)} ms` })) : [];
    }, { line: "line", shape: "circle" }),
  });
}

function drawLayers() {
  const boxes = state.pair.flatMap((row, i) => {
    const layers = data.layers[row.program];
    if (!layers) return [];
    const longest = Math.max(...layers.map((l) => Math.max(l.ms, l.least ?? 0)));
    return [
      element("p", {}, `${"AB"[i]}: ${nameOf(row)}, the ${layers.length} slowest layers`),
      element("div", { class: "layers" },
        ...layers.flatMap((l) => [
          element("span", {}, `${l.module} (${l.kind})`),
          element("span", { class: "bar" },
            element("i", { style: `width:${(100 * l.ms) / longest}%` }),
            l.least === null ? null : element("b", { style: `left:${(100 * l.least) / longest}%`, title: "its limit" })),
          element("span", {}, `${number(l.ms)} ms, ${percent(l.share, 0)}` + (l.least === null ? "" : `, ${number(l.ms / l.least)} × its limit`)),
        ])),
    ];
  });
  at("layers-box").hidden = boxes.length === 0;
  at("layers").replaceChildren(...boxes);
}

// Two rows: which one, what it costs, how sure that is, and how far from the limit.

function ratioOf(a, b) {
  // Programs that took turns saw the same machine: the ratio within each turn.
  if (a.run !== b.run || a.turns.length !== b.turns.length || a.machine !== b.machine || a.p50 === null || b.p50 === null) return null;
  const ratios = a.turns.map((ms, i) => ms / a.batch / (b.turns[i] / b.batch)).sort((x, y) => x - y);
  const middle = ratios.length / 2;
  const median = ratios.length % 2 ? ratios[Math.floor(middle)] : (ratios[middle - 1] + ratios[middle]) / 2;
  return { median, low: ratios[0], high: ratios[ratios.length - 1], turns: ratios.length };
}

function bits(hex) {
  return [...hex].flatMap((digit) => [8, 4, 2, 1].map((bit) => (parseInt(digit, 16) & bit ? 1 : 0)));
}

function signed(points) {
  return (points >= 0 ? "+" : "\u2212") + Math.abs(points).toFixed(1);
}

function costOf(row) {
  if (row.isEager) return "it is the eager model";
  const eager = data.rows.find(
    (r) => r.isEager && r.machine === row.machine && r.scenario === row.scenario && r.weights === row.weights && r.network === row.network,
  );
  if (!eager) return "not known: no eager model of these weights";
  const accuracy = accuracyOf(row, eager);
  return accuracy.short ?? `${signed(100 * (row.top1 - eager.top1))} points of top-1${accuracy.told === null ? ", on other images" : ""}`;
}

function mcnemar(first, second) {
  const count = first + second;
  let term = -count * Math.log(2), sum = 0;
  for (let k = 0; k <= Math.min(first, second); k++) {
    sum += Math.exp(term);
    term += Math.log(count - k) - Math.log(k + 1);
  }
  return Math.min(1, 2 * sum);
}

function accuracyOf(a, b) {
  if (a.data !== b.data || a.images !== b.images) return { text: "Their accuracies are of different images and do not compare.", told: null };
  if (a.hits === null || b.hits === null)
    return { text: `Accuracy: ${percent(a.top1)} against ${percent(b.top1)}; which images were right is not recorded, so the intervals are all that is known.`, told: a.low > b.high ? 1 : a.high < b.low ? -1 : 0 };
  const own = bits(data.hits[a.hits]), other = bits(data.hits[b.hits]);
  let onlyA = 0, onlyB = 0;
  for (let i = 0; i < a.images; i++) {
    if (own[i] && !other[i]) onlyA++;
    if (!own[i] && other[i]) onlyB++;
  }
  const p = mcnemar(onlyA, onlyB);
  const points = (100 * (onlyA - onlyB)) / a.images;
  const told = p < 0.05 ? Math.sign(onlyA - onlyB) : 0;
  const words = told > 0 ? "A is more accurate" : told < 0 ? "A is less accurate" : "no difference told";
  // 95 %, of the paired difference; one more of each, or no image that differs would be certainty.
  const half = (196 * Math.sqrt(onlyA + onlyB + 2 - (onlyA - onlyB) ** 2 / a.images)) / a.images;
  const range = `${signed(points - half)} to ${signed(points + half)}`;
  return {
    text: `Accuracy, image by image: of ${a.images.toLocaleString("en")}, ${onlyA} are right in A only and ${onlyB} in B only: ${signed(points)} points for A (95 %: ${range}), McNemar p ${p < 0.001 ? "below 0.001" : "= " + p.toPrecision(2)}: ${words}.`,
    short: `${signed(points)} points of top-1 (95 %: ${range}; p ${p < 0.001 ? "below 0.001" : "= " + p.toPrecision(2)})`,
    worst: { A: points - half, B: -points - half },
    told,
  };
}

function verdictOf(ratio, { told, worst }) {
  const faster = ratio === null ? 0 : ratio.high < 1 ? 1 : ratio.low > 1 ? -1 : 0;
  if (ratio === null) return "Not measured in the same run: their times do not compare. Measure both in one call of perf/latency.py.";
  const fast = faster > 0 ? "A" : "B", slow = faster > 0 ? "B" : "A";
  if (faster === 0) return told ? `Take ${told > 0 ? "A" : "B"}: it is more accurate, and neither is faster in every turn (inconclusive).` : "Either will do: neither is faster in every turn (inconclusive), and the images tell no difference in accuracy.";
  if (told === null) return `${fast} is faster. What that costs in accuracy is not known.`;
  if (told === faster) return `Take ${fast}: it is faster and more accurate.`;
  if (told === -faster) return `A trade: ${fast} is faster, ${slow} is more accurate.`;
  const bound = worst ? `; ${fast} may be ${Math.max(0, -worst[fast]).toFixed(1)} points less accurate` : "";
  return `Take ${fast}: it is faster in every turn, and these images tell no difference in accuracy${bound}.`;
}

function fillPair() {
  const [a, b] = state.pair;
  if (!a) return at("pair").replaceChildren(element("p", { class: "note" }, "Choose two rows of the table, or points, to compare them."));
  const facts = [
    ["device", (r) => data.machines[r.machine]],
    ["asked for", (r) => `${tableOf(r).title}; ${r.threads} threads; ${data.scopes[r.scope]}`],
    ["p50, p90, p99", (r) => `${number(r.p50)}, ${number(r.p90)}, ${number(r.p99)} ms of ${r.calls.toLocaleString("en")} calls`],
    ["median of turns", (r) => `${number(Math.min(...r.turns))} to ${number(Math.max(...r.turns))} ms`],
    ["images/s", (r) => number(r.rate)],
    ["top-1", (r) => `${percent(r.top1)}, 95 %: ${percent(r.low)} to ${percent(r.high)} (${r.images.toLocaleString("en")} images of ${r.data})`],
    ["costs, beside eager", costOf],
    ["from the limit", (r) => (r.floor && r.p50 && r.scenario !== "server" ? `${number(r.p50 / r.floor)} times ${number(r.floor)} ms, the least this device needs for ${r.limit ?? "it"}` : "not known")],
    ["peak", (r) => r.peak ?? "not known"],
    ["memory", (r) => r.cells[tableOf(r).columns.indexOf("peak memory")] ?? "–"],
    ["stable", (r) => (r.unstable.length ? `no: ${r.unstable.join("; ")}` : "yes")],
    ["harness", (r) => `${number(1000 * r.overhead)} µs of a call`],
    ["measured", (r) => `${r.run}, commit ${r.commit.slice(0, 7)}, program ${r.program.slice(0, 7)}, weights ${r.weights}`],
  ];
  const children = [];
  if (b) {
    const ratio = ratioOf(a, b), accuracy = accuracyOf(a, b);
    children.push(element("p", { class: "answer" }, verdictOf(ratio, accuracy)));
    const lines = [accuracy.text];
    if (ratio) lines.unshift(`Time of an image: A takes ${ratio.median.toFixed(2)} of B's, within turns ${ratio.low.toFixed(2)} to ${ratio.high.toFixed(2)} (${ratio.turns} turns).`);
    if (accuracy.told === 0) lines.push(`To tell smaller differences, classify more images: perf/accuracy.py --data FOLDER (${a.images.toLocaleString("en")} place a top-1 within ${percent((a.high - a.low) / 2)}).`);
    if (ratio && ratio.low < 1 && ratio.high > 1) lines.push("To tell smaller differences in time, measure longer: perf/latency.py --seconds 60, on a machine that does nothing else.");
    if (a.unstable.length || b.unstable.length) lines.push("A row is not stable: what made it so may be in the difference.");
    children.push(element("ul", {}, ...lines.map((line) => element("li", {}, line))));
  }
  const cells = (of) => state.pair.map((row, i) => element("td", { class: "word", "data-title": "AB"[i] }, of(row)));
  children.push(
    element("div", { class: "box" }, element("table", { class: "pair" },
      element("thead", {}, element("tr", {}, element("th", {}), ...state.pair.map((row, i) => element("th", { class: `word head-${"ab"[i]}` }, `${"AB"[i]}: ${nameOf(row)}`)))),
      element("tbody", {}, ...facts.map(([name, of]) => element("tr", {}, element("th", { class: "word", scope: "row" }, name), ...cells(of)))))),
    element("p", { class: "note" }, "Where the time goes, layer by layer: python perf/layers.py DIRECTORY; this page shows it at its next python perf/report.py."),
  );
  at("pair").replaceChildren(...children);
}

function render() {
  fillFilters();
  const rows = shownRows();
  const isLike = (row) => ["machine", "scope", "scenario"].every((key) => row[key] === rows[0][key]);
  if (state.pair.length === 0 || !state.pair.every(isLike)) state.pair = firstPair(rows);
  fillTable(rows);
  drawTradeoff(rows);
  fillPair();
  at("pair-charts").hidden = state.pair.length === 0;
  if (state.pair.length) drawPair();
}

function firstPair(rows) {
  // The two fastest of the first network, or the fastest beside the eager model.
  const own = rows.filter((row) => row.network === rows[0].network);
  const { isTime } = tableOf(rows[0]);
  own.sort((a, b) => (isTime ? (a.p50 ?? Infinity) - (b.p50 ?? Infinity) : b.rate - a.rate));
  return [...own.filter((row) => !row.isEager), ...own.filter((row) => row.isEager)].slice(0, 2);
}

function begin() {
  for (const [key, , , hasAll] of FILTERS) state.filter[key] = hasAll ? "" : String(data.rows[0][key]);
  render();
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    drawTradeoff(shownRows());
    if (state.pair.length) drawPair();
  });
}

begin();
