"use strict";
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const one = (id) => document.getElementById(id);
  const { charts, defaults, groups, points: told, records } = JSON.parse(one("data").textContent);

  /** An element; what is not a property of elements is set as an attribute, text is only ever text. */
  function make(tag, facts = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(facts)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  }

  // Tooltips, of rows and of points

  const tip = one("tip");

  function showTip(lines, x, y) {
    tip.replaceChildren(...lines.map((line) => make("p", {}, line)));
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const right = Math.min(x + 14, innerWidth - width - 8);
    const below = y + 18 + height < innerHeight ? y + 18 : y - height - 14;
    tip.style.left = `${Math.max(8, right)}px`;
    tip.style.top = `${Math.max(8, below)}px`;
  }

  function hideTip() {
    tip.hidden = true;
  }

  document.addEventListener("mousemove", (event) => {
    const row = event.target.closest?.("tr[data-tip]");
    if (row) showTip(row.dataset.tip.split("\n"), event.clientX, event.clientY);
    else if (!event.target.closest?.(".chart")) hideTip();
  });
  document.addEventListener("focusin", (event) => {
    const row = event.target.closest?.("tr[data-tip]");
    if (!row || !event.target.matches(":focus-visible")) return hideTip();
    const { left, bottom } = event.target.getBoundingClientRect();
    showTip(row.dataset.tip.split("\n"), left, bottom - 8);
    event.target.setAttribute("aria-describedby", "tip");
  });
  document.addEventListener("focusout", hideTip);
  document.addEventListener("scroll", hideTip, { passive: true, capture: true });
  document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
  document.addEventListener("mouseleave", hideTip);

  // Sorting: up, down, and back to the board's own order; the dense model stays on top

  function sortBy(heading) {
    const table = heading.closest("table"), body = table.tBodies[0];
    const column = [...heading.parentNode.children].indexOf(heading);
    const next = { none: "ascending", ascending: "descending", descending: "none" }[heading.getAttribute("aria-sort")];
    all("thead th", table).forEach((each) => each.setAttribute("aria-sort", "none"));
    heading.setAttribute("aria-sort", next);
    const rows = [...body.rows];
    rows.forEach((row, place) => (row.dataset.place ??= place));
    const turn = next === "descending" ? -1 : 1;
    const numeric = heading.classList.contains("number");
    const compare = (first, second) => {
      const [one, other] = [first.cells[column], second.cells[column]];
      if (!numeric) return turn * one.textContent.localeCompare(other.textContent, "en", { numeric: true });
      const [a, b] = [one.dataset.sort, other.dataset.sort];
      if (a === undefined || b === undefined) return (a === undefined) - (b === undefined); // what has no number comes last
      return turn * (a - b);
    };
    rows.sort((first, second) => {
      const pinned = second.classList.contains("dense") - first.classList.contains("dense");
      return pinned || (next !== "none" && compare(first, second)) || first.dataset.place - second.dataset.place;
    });
    body.append(...rows);
  }

  // Plotly, unpacked when the first figure comes into sight

  let plotly;

  function withPlotly() {
    plotly ??= unpack(one("plotly").textContent).then((text) => {
      document.head.append(Object.assign(document.createElement("script"), { textContent: text }));
      if (!window.Plotly) throw new Error("it did not start");
      return window.Plotly;
    });
    return plotly;
  }

  async function unpack(packed) {
    const bytes = Uint8Array.from(atob(packed.trim()), (letter) => letter.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }

  // Figures

  const NARROW = 560; // pixels of a figure on a phone
  const style = getComputedStyle(document.documentElement);

  /** A specification with the theme's colours in the place of their names. */
  function coloured(part) {
    if (Array.isArray(part)) return part.map(coloured);
    if (part && typeof part === "object") {
      return Object.fromEntries(Object.entries(part).map(([key, value]) => [key, key === "customdata" ? value : coloured(value)]));
    }
    const found = typeof part === "string" && part.match(/^@([a-z]+\d*)(?::([\d.]+))?$/);
    return found ? tone(found[1], found[2]) : part;
  }

  /** The first with what the second says otherwise. */
  function merged(first, second) {
    const plain = (part) => part && typeof part === "object" && !Array.isArray(part);
    if (!plain(first) || !plain(second)) return second;
    const own = Object.entries(second).map(([key, value]) => [key, merged(first[key], value)]);
    return { ...first, ...Object.fromEntries(own) };
  }

  function tone(name, opacity) {
    const value = style.getPropertyValue(`--${name}`).trim();
    if (opacity === undefined) return value;
    const [red, green, blue] = [1, 3, 5].map((at) => parseInt(value.slice(at, at + 2), 16));
    return `rgba(${red},${green},${blue},${opacity})`;
  }

  function fits(method) {
    const words = filters.elements.method.value.toLowerCase().split(/\s+/).filter(Boolean);
    const name = method.toLowerCase();
    return words.every((word) => name.includes(word));
  }

  /** Whether the filter leaves a trace: one method's, or a line through several; bars are cut down elsewhere. */
  function stays(trace) {
    if (trace.meta) return (trace.meta.methods ?? [trace.meta.method]).every(fits);
    return trace.type !== "scatter" || fits(told[trace.customdata[0][0]].method);
  }

  /** What is left of a figure under the filter of methods, in the theme's colours. */
  function drawn(spec, width) {
    const full = spec.data.map((trace) => merged(defaults[trace.type], trace));
    const { data, layout } = coloured({ data: full, layout: merged(defaults.layout, spec.layout) });
    layout.font.family = style.getPropertyValue("--text");
    layout.dragmode = false;
    if (layout.dense !== undefined) {
      const name = { text: "dense", showarrow: false, xref: "paper", x: 1, xanchor: "right", yanchor: "bottom", yref: "y" };
      const at = layout.yaxis.type === "log" ? Math.log10(layout.dense) : layout.dense;
      layout.annotations = [{ ...name, y: at, font: { size: 11, color: tone("soft") } }];
    }
    if (spec.methods) {
      const kept = spec.methods.flatMap((method, place) => (fits(method) ? [place] : []));
      const pick = (list) => kept.map((place) => list[place]);
      for (const trace of data) {
        for (const key of ["x", "customdata"]) trace[key] = pick(trace[key]);
        trace.y = kept.map((_, place) => place);
      }
      const room = Math.floor(width / 6.1);
      layout.annotations = pick(layout.annotations).map((name, place) => ({
        ...name, y: place, text: name.text.length > room ? `${name.text.slice(0, room - 1)}…` : name.text,
      }));
      layout.yaxis.range = [kept.length - 0.5, -0.75];
      layout.height = 70 + (layout.height - 70) * (kept.length / spec.methods.length);
    }
    if (spec.grid) label(spec.grid, data[0], layout, width);
    if (width < NARROW) for (const { marker } of data.filter((trace) => trace.type === "scatter")) marker.size = 8;
    return { data: data.filter(stays), layout };
  }

  /** Writes the numbers of a heat map into its cells where there is room, in black or white, whichever is read better. */
  function label(grid, trace, layout, width) {
    if (width < NARROW) {
      layout.yaxis.tickfont = { ...layout.yaxis.tickfont, size: 9 };
      layout.yaxis.ticktext = layout.yaxis.ticktext.map((name) => (name.length > 16 ? `…${name.slice(-15)}` : name));
    }
    const columns = trace.x.length, flat = trace.z.flat().filter((z) => z !== null);
    trace.showscale = columns > 16 || (width - 130) / columns < 34;
    if (trace.showscale) return;
    const [low, high] = [trace.zmin ?? Math.min(...flat), trace.zmax ?? Math.max(...flat)];
    const text = (z) => (grid.square ? z.toFixed(2) : String(Number(z.toPrecision(3))));
    layout.annotations = trace.z.flatMap((line, y) => line.flatMap((z, x) => z === null ? [] : [
      { x, y, text: text(z), showarrow: false, font: { size: 11, color: isLight(trace.colorscale, (z - low) / (high - low || 1)) ? "#000" : "#fff" } },
    ]));
  }

  /** Whether black is read better than white on a colour of a scale. */
  function isLight(scale, place) {
    const after = Math.max(1, scale.findIndex(([end]) => end >= place)), [from, to] = [scale[after - 1], scale[after]];
    const share = (place - from[0]) / (to[0] - from[0]);
    const linear = [1, 3, 5].map((at) => {
      const [one, other] = [from[1], to[1]].map((colour) => parseInt(colour.slice(at, at + 2), 16) / 255);
      const part = one + share * (other - one);
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.179;
  }

  async function draw(chart) {
    chart.drawnAs = chart.dataset.chart;
    const spec = charts[chart.drawnAs];
    if (!chart.picture) {
      chart.picture = make("div");
      chart.ring = make("div", { class: "ring", hidden: "" });
      chart.append(make("p", { class: "waits" }, "Drawing …"));
    }
    chart.setAttribute("aria-label", `${spec.label}. Arrow keys go from point to point, Enter opens its runs.`);
    let Plotly;
    try {
      Plotly = await withPlotly();
    } catch (error) {
      chart.replaceChildren(make("p", { class: "waits" }, `This browser cannot draw the figure: ${error.message}.`));
      return;
    }
    const first = !chart.picture.isConnected;
    if (first) chart.replaceChildren(chart.picture, chart.ring);
    const { data, layout } = drawn(spec, chart.clientWidth);
    await Plotly.react(chart.picture, data, layout, { displayModeBar: false, responsive: true });
    if (first) listen(chart);
    legend(chart, spec);
  }

  function legend(chart, spec) {
    chart.querySelector(".key")?.remove();
    if (!spec.legend) return;
    const items = spec.legend.filter((item) => !item.methods || item.methods.some(fits)).map((item) => {
      const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      svg.setAttribute("class", `mark ${item.colour.slice(1)}`);
      svg.setAttribute("viewBox", "0 0 12 12");
      svg.setAttribute("aria-hidden", "true");
      svg.append(document.createElementNS("http://www.w3.org/2000/svg", "use"));
      svg.firstChild.setAttribute("href", `#shape-${item.shape}`);
      return make("li", {}, svg, item.name);
    });
    chart.append(make("ul", { class: "key" }, ...items));
  }

  /** What a point says and opens; of heat maps it is made here. */
  function about(chart, point) {
    const grid = charts[chart.drawnAs].grid;
    if (!grid) {
      const [place, ...line] = point.customdata;
      return { runs: told[place].runs, tip: [...told[place].tip, ...line] };
    }
    const { down, across, what, runs, square } = grid;
    const value = point.z === null || point.z === undefined ? "not measured" : `${what} ${Number(point.z.toPrecision(4))}`;
    const place = square ? [down[point.y], `and ${across[point.x]}`] : [`${down[point.y]}, block ${across[point.x]}`];
    return { tip: [...place, value], runs: square ? [...new Set([runs[point.y], runs[point.x]])].filter(Boolean) : runs };
  }

  function listen(chart) {
    const { picture } = chart;
    picture.on("plotly_hover", ({ points, event }) => {
      const { tip: lines, runs } = about(chart, points[0]);
      chart.classList.toggle("opens", runs.length > 0);
      if (event?.clientX !== undefined) showTip(lines, event.clientX, event.clientY);
    });
    picture.on("plotly_unhover", () => {
      chart.classList.remove("opens");
      hideTip();
    });
    picture.on("plotly_click", ({ points }) => openPanel(about(chart, points[0]).runs));
    chart.addEventListener("keydown", (event) => walk(chart, event));
    chart.addEventListener("blur", () => (chart.ring.hidden = true));
  }

  /** All points of a figure from left to right, with where they are in it, in pixels. */
  function pointsOf(chart) {
    const layout = chart.picture._fullLayout, sums = [];
    const found = chart.picture.data.flatMap((trace) => {
      const [across, up] = [layout[trace.xaxis === "x2" ? "xaxis2" : "xaxis"], layout.yaxis];
      const at = (x, y, facts) => ({ ...facts, left: across._offset + across.d2p(x), top: up._offset + up.d2p(y) });
      if (trace.type === "heatmap") {
        return trace.z.flatMap((line, y) => line.map((z, x) => ({ ...at(x, y, { x, y, z }), row: y })));
      }
      if (!trace.customdata) return [];
      return trace.customdata.map((customdata, index) => {
        if (trace.type !== "bar") return at(trace.x[index], trace.y[index], { customdata });
        const before = sums[index] ?? 0;
        sums[index] = before + trace.x[index];
        return { ...at(before + trace.x[index] / 2, trace.y[index], { customdata }), row: index, none: !trace.x[index] };
      });
    });
    return found.filter((point) => !point.none).sort((a, b) => (a.row ?? 0) - (b.row ?? 0) || a.left - b.left || a.top - b.top);
  }

  function walk(chart, event) {
    const points = pointsOf(chart), last = points.length - 1;
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!points.length) return;
    if (event.key === "Enter" && chart.at !== undefined) openPanel(about(chart, points[Math.min(chart.at, last)]).runs);
    else if (step || event.key === "Home" || event.key === "End") {
      chart.at = { Home: 0, End: last }[event.key] ?? (chart.at === undefined ? 0 : Math.max(0, Math.min(last, chart.at + step)));
      const point = points[chart.at], { tip: lines } = about(chart, point);
      const box = chart.picture.getBoundingClientRect();
      Object.assign(chart.ring.style, { left: `${point.left}px`, top: `${point.top}px` });
      chart.ring.hidden = false;
      showTip(lines, box.left + point.left, box.top + point.top);
      one("said").textContent = lines.join(", ");
    } else return;
    event.preventDefault();
  }

  const seen = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      target.inSight = isIntersecting;
      if (isIntersecting && target.stale !== false) refresh(target);
    }
  }, { rootMargin: "400px" });

  function refresh(chart) {
    chart.stale = false;
    draw(chart);
  }

  function redraw() {
    for (const chart of all(".chart")) {
      chart.stale = true;
      if (chart.inSight) refresh(chart);
    }
  }

  // Filters

  const filters = one("filters");

  function filter() {
    const chosen = Object.fromEntries(["model", "target", "evaluation", "machine"].map((name) => [name, filters.elements[name].value]));
    const is = (name, value) => !chosen[name] || value === undefined || chosen[name] === value;
    const words = filters.elements.method.value.trim();
    let tables = 0, rows = 0;
    for (const section of all(".section[data-evaluation]")) {
      const { model, machine, evaluation } = section.dataset;
      const fitting = is("model", model) && is("machine", machine) && is("evaluation", evaluation);
      const boards = all(".board", section);
      for (const board of boards) {
        let left = 0;
        for (const row of all("tbody tr", board)) {
          const dense = row.classList.contains("dense");
          row.hidden = !(dense || fits(row.dataset.method));
          if (!row.hidden && (!dense || !words || fits(row.dataset.method))) left += 1;
        }
        board.hidden = !(fitting && is("target", board.dataset.target) && left > 0);
        if (!board.hidden) [tables, rows] = [tables + 1, rows + left];
      }
      const narrowed = chosen.target || words;
      section.hidden = !fitting || (boards.length || narrowed ? boards.every((board) => board.hidden) : false);
    }
    for (const item of all(".runs li")) {
      const { model, machine, target, method } = item.dataset;
      item.hidden = !(is("model", model) && is("machine", machine) && is("target", target) && fits(method) && !chosen.evaluation);
    }
    for (const section of all(".runs")) section.hidden = all("li", section).every((item) => item.hidden);
    filterHeats(is);
    for (const link of all(".contents li")) link.hidden = one(link.dataset.for).hidden;
    one("nothing").hidden = tables > 0 || !all(".section[data-evaluation]").length || all(".section").some((each) => !each.hidden && each.dataset.evaluation);
    one("count").textContent = `${rows.toLocaleString("en")} rows in ${tables} table${tables === 1 ? "" : "s"}`;
    for (const field of filters.elements) field.classList.toggle("set", Boolean(field.value && field.name));
    redraw();
  }

  function filterHeats(is) {
    const fitting = (part) => {
      const record = records[part.dataset.runs.split(" ")[0]] ?? {};
      return is("model", record.model) && is("machine", record.machine) && is("target", record.target);
    };
    for (const figure of all(".overlap")) figure.hidden = !fitting(figure);
    const choice = one("heat");
    if (!choice) return;
    for (const option of choice.options) option.hidden = option.disabled = !(fitting(option) && fits(option.dataset.method));
    for (const group of all("optgroup", choice)) group.hidden = [...group.children].every((option) => option.hidden);
    const left = [...choice.options].filter((option) => !option.hidden);
    one("heats").hidden = !left.length;
    if (left.length && choice.selectedOptions[0]?.hidden !== false) left[0].selected = true;
    one("heats").querySelector(".chart").dataset.chart = choice.value;
  }

  // Records

  const panel = one("panel");

  function openPanel(keys, chosen = keys[0]) {
    if (!keys.length) return;
    hideTip();
    const record = records[chosen];
    one("panel-title").textContent = record ? record.title : "No such record";
    one("panel-body").replaceChildren(...(record ? pageOf(record, keys, chosen) : [make("p", {}, `This page has no record ${chosen}.`)]));
    if (record) history.replaceState(null, "", `#record=${chosen}`);
    if (!panel.open) panel.showModal();
    one("panel-title").focus();
    panel.scrollTop = 0;
  }

  function pageOf(record, keys, chosen) {
    const parts = [make("p", { class: "where" }, record.where)];
    if (keys.length > 1) {
      const alike = new Set(keys.map((key) => records[key].title)).size === 1;
      const tab = (key) => make("button", { type: "button", "aria-pressed": String(key === chosen), onclick: () => openPanel(keys, key) },
        alike ? records[key].short : `${records[key].title}, ${records[key].short}`);
      parts.unshift(make("div", { class: "tabs", role: "group", "aria-label": "Runs of this row" }, ...keys.map(tab)));
    }
    parts.push(make("p", { class: "where" }, "Record ", make("a", { href: `#record=${chosen}` }, record.id)));
    if (record.command) {
      const said = make("button", { type: "button", class: "quiet" }, "Copy");
      said.addEventListener("click", () => copy(record.command, said));
      parts.push(make("h3", {}, "Run it again"), make("div", { class: "command" }, make("code", {}, record.command), said));
    }
    for (const { title, facts } of record.groups.map((place) => groups[place])) {
      const list = make("dl", {}, ...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, valueOf(value))]));
      const folded = /^(Conditions|Packages)/.test(title);
      parts.push(...(folded ? [make("details", {}, make("summary", {}, title), list)] : [make("h3", {}, title), list]));
    }
    return parts;
  }

  function valueOf(value) {
    if (typeof value === "string") return value;
    const most = Math.max(...value.bars.map(([, seconds]) => seconds), 1e-9);
    return make("div", { class: "bars" }, ...value.bars.flatMap(([name, seconds]) => {
      const bar = make("i", { class: /^[a-z]+$/.test(name) ? name : "other" });
      bar.style.width = `${(100 * seconds) / most}%`;
      return [make("span", {}, name), bar, make("span", { class: "amount" }, `${seconds.toFixed(2)} s`)];
    }));
  }

  async function copy(text, button) {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(button.previousSibling);
      button.textContent = "Selected";
    }
  }

  function fromAddress() {
    const found = location.hash.match(/^#record=(.+)$/);
    if (!found) return panel.open && panel.close();
    const asked = decodeURIComponent(found[1]);
    openPanel([Object.keys(records).find((key) => key === asked) ?? Object.keys(records).find((key) => key.startsWith(asked)) ?? asked]);
  }

  panel.addEventListener("close", () => location.hash.startsWith("#record=") && history.replaceState(null, "", location.href.split("#")[0]));
  panel.addEventListener("click", (event) => event.target === panel && panel.close());
  one("panel-close").addEventListener("click", () => panel.close());
  addEventListener("hashchange", fromAddress);

  // Light and dark

  const themes = ["system", "light", "dark"];

  function setTheme(name) {
    if (name === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    one("theme").textContent = `Theme: ${name}`;
    one("theme").setAttribute("aria-label", `Colour theme: ${name === "system" ? "as the system has it" : name}`);
    one("theme").dataset.name = name;
    try {
      localStorage.setItem("prunebench-theme", name);
    } catch { /* a browser that keeps nothing for files */ }
    redraw();
  }

  function keptTheme() {
    try {
      const kept = localStorage.getItem("prunebench-theme");
      return themes.includes(kept) ? kept : "system";
    } catch {
      return "system";
    }
  }

  // What is clicked

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button"), row = event.target.closest("tr[data-runs]");
    if (button?.classList.contains("sort")) sortBy(button.closest("th"));
    else if (button?.dataset.shows) {
      all("button", button.parentNode).forEach((each) => each.setAttribute("aria-pressed", String(each === button)));
      for (const chart of all(".chart", button.closest("figure"))) {
        chart.hidden = chart.dataset.chart !== button.dataset.shows;
        chart.stale = true; // drawn anew when it is seen: the window may have changed while it was hidden
      }
    } else if (button?.dataset.runs) openPanel(button.dataset.runs.split(" ").filter(Boolean));
    else if (row && !getSelection().toString()) openPanel(row.dataset.runs.split(" ").filter(Boolean));
  });
  one("theme").addEventListener("click", () => setTheme(themes[(themes.indexOf(one("theme").dataset.name) + 1) % themes.length]));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  filters.addEventListener("input", filter);
  filters.addEventListener("reset", () => setTimeout(filter));
  filters.addEventListener("submit", (event) => event.preventDefault());
  one("heat")?.addEventListener("change", filter);

  const narrow = matchMedia("(max-width: 1120px)");
  const fold = () => (one("contents").open = !narrow.matches);
  narrow.addEventListener("change", fold);
  fold();

  const current = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      const link = document.querySelector(`.contents [href="#${target.id}"]`);
      if (isIntersecting) link?.setAttribute("aria-current", "true");
      else link?.removeAttribute("aria-current");
    }
  }, { rootMargin: "-20% 0px -70% 0px" });

  setTheme(keptTheme());
  filter();
  all(".section").forEach((section) => current.observe(section));
  all(".chart").forEach((chart) => seen.observe(chart));
  fromAddress();
})();
