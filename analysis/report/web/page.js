/* Draws the charts in #data with uPlot, sorts tables, switches light and dark. Nothing is fetched, nothing is stored. */
(() => {
  "use strict";
  const charts = JSON.parse(document.getElementById("data").textContent);
  const drawn = new Map();

  // ---- numbers in words -------------------------------------------------------------------------------------------
  const digits = (v, n = 3) => {
    if (v === 0) return "0";
    const size = Math.abs(v);
    if (size >= 1e6) return (v / 1e6).toPrecision(3).replace(/\.?0+$/, "") + "M";
    if (size >= 1000) return Math.round(v).toLocaleString("en");
    return String(parseFloat(v.toPrecision(n)));
  };
  const seconds = (v) => {
    if (v === 0) return "0";
    const size = Math.abs(v);
    if (size < 0.9995e-3) return digits(v * 1e6) + " µs";
    if (size < 0.9995) return digits(v * 1e3) + " ms";
    return digits(v) + " s";
  };
  const clock = (c) => (v) => {
    const end = c.x[c.x.length - 1];
    if (end < 120) return digits(v, 4) + " s";
    const h = Math.floor(v / 3600), m = Math.floor(v / 60) % 60, s = Math.floor(v % 60);
    const two = (k) => String(k).padStart(2, "0");
    return end >= 3600 ? `${h}:${two(m)}:${two(s)}` : `${m}:${two(s)}`;
  };
  const percent = (v) => digits(v * 100, v > 0.99 && v < 1 ? 4 : 3) + "%";
  const words = (unit) => (v) => v == null ? ""
    : unit === "s" ? seconds(v) : unit === "%" ? percent(v) : unit === "USD" ? "$" + digits(v) : `${digits(v)} ${unit}`;
  const ticks = (unit) => unit === "s" ? seconds : unit === "%" ? percent : unit === "USD" ? (v) => "$" + digits(v) : (v) => digits(v);

  // ---- colours come from the style sheet, so both themes have one source --------------------------------------------
  const probe = document.createElement("span");
  probe.hidden = true;
  document.body.append(probe);
  const color = (name) => {
    probe.className = "";
    probe.style.color = `var(--${typeof name === "number" ? "c" + (name % 8) : name})`;
    return getComputedStyle(probe).color;
  };
  const fade = (c, alpha) => c.replace(/^rgba?\(([^)]+)\)$/, (_, v) => `rgba(${v.split(/[,\s]+/).slice(0, 3).join(", ")}, ${alpha})`);

  // ---- axes ---------------------------------------------------------------------------------------------------------
  const FONT = "12px system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif";
  const logSplits = (self, axis, min, max) => {
    const wide = Math.log10(max / min) > 4;
    const narrow = Math.log10(max / min) < 1.2;
    const steps = wide ? [1] : narrow ? [1, 1.5, 2, 3, 4, 5, 6, 8] : [1, 2, 5];
    const found = [];
    for (let e = Math.floor(Math.log10(min)); e <= Math.ceil(Math.log10(max)); e++)
      for (const s of steps) {
        const v = parseFloat((s * 10 ** e).toPrecision(6));
        if (v >= min * 0.999 && v <= max * 1.001) found.push(v);
      }
    return found;
  };
  const logRange = (pad) => (self, min, max) => {
    if (min == null || !(min > 0)) return [0.001, 1];
    return [min / pad, max * pad];
  };
  const INCREMENTS = [1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400];
  const axis = (c, key, bare_x) => {
    const log = key === "x" ? c.log_x : c.log_y;
    const unit = key === "x" ? c.x_unit : c.y_unit;
    const say = key === "x" && c.x_time ? clock(c) : ticks(unit);
    const bare = key === "x" && !c.x_time && !["s", "%", "USD"].includes(unit);
    const label = key !== "x" ? undefined : c.small || c.x_time ? undefined : bare ? `${c.x_label}, ${unit}` : c.x_label;
    const made = {
      scale: key, stroke: color("quiet"), font: FONT, labelFont: FONT, label, labelSize: 18, labelGap: 2, gap: 4,
      grid: { stroke: color("rule"), width: 1 }, ticks: { show: key === "x", stroke: color("rule"), width: 1, size: 4 },
      values: (self, splits) => splits.map((v) => v == null || bare_x ? "" : say(v)),
      space: key === "x" ? 68 : c.small ? 28 : 36,
    };
    made.size = key === "y" ? 58 : bare_x ? 6 : 26;
    if (key === "x" && c.x_time) made.incrs = INCREMENTS;
    if (log) {
      made.splits = logSplits;
      made.filter = (self, splits, i, space) => {
        // labels that would touch are left out; the grid line stays
        const dim = (key === "x" ? 52 : 17) * devicePixelRatio, taken = [];
        const decade = (v) => Math.abs(Math.log10(v) - Math.round(Math.log10(v))) < 1e-6;
        const shown = new Set();
        for (const v of [...splits.filter(decade), ...splits.filter((v) => !decade(v))]) {
          const at = self.valToPos(v, key, true);
          if (taken.some((t) => Math.abs(t - at) < dim)) continue;
          taken.push(at);
          shown.add(v);
        }
        return splits.map((v) => shown.has(v) ? v : null);
      };
    }
    return made;
  };

  // ---- one chart ------------------------------------------------------------------------------------------------------
  const { linear, stepped, bars } = uPlot.paths;
  const series = (c, line, k) => {
    const stroke = color(line.color);
    const made = {
      label: line.name, stroke, width: line.color === "muted" ? 1.25 : 1.75, scale: "y",
      value: (self, v) => words(c.y_unit)(v), points: { show: false }, paths: linear(), spanGaps: false,
    };
    if (line.shape === "step") made.paths = stepped({ align: 1 });
    if (line.shape === "bars") Object.assign(made, { paths: bars({ size: [0.92, 60], align: 0 }), fill: fade(stroke, 0.75), width: 0 });
    // of points at one place each keeps a ring of its own, and a line shows between the dashes of the one over it
    const rings = { spanGaps: true, dash: k % 4 ? [10, 3 + 3 * (k % 4)] : undefined, points: { show: true, size: 8 + 5 * (k % 4), fill: "transparent", width: 2 } };
    if (line.shape === "points") Object.assign(made, rings);
    if (line.shape === "stairs") Object.assign(made, { paths: stepped({ align: 1 }), ...rings });
    if (line.shape === "dots") Object.assign(made, { paths: () => null, points: { show: true, size: 4, fill: stroke, width: 0 } });
    return made;
  };
  const overlays = (c) => (self) => {
    const { ctx } = self, ratio = devicePixelRatio;
    const { left, top, width, height } = self.bbox;
    ctx.save();
    ctx.beginPath();
    ctx.rect(left, top, width, height);
    ctx.clip();
    c.lines.forEach((line, k) => {
      if (!line.low || !line.high || !self.series[k + 1].show) return;
      ctx.strokeStyle = color(line.color);
      ctx.lineWidth = 1.5 * ratio;
      c.x.forEach((x, i) => {
        if (line.y[i] == null) return;
        const at = self.valToPos(x, "x", true) + (k - (c.lines.length - 1) / 2) * 5 * ratio;
        const [low, high] = [line.low[i] ?? line.y[i], line.high[i] ?? line.y[i]].map((v) => self.valToPos(v, "y", true));
        ctx.beginPath();
        ctx.moveTo(at, low);
        ctx.lineTo(at, high);
        for (const y of [low, high]) { ctx.moveTo(at - 4 * ratio, y); ctx.lineTo(at + 4 * ratio, y); }
        ctx.stroke();
      });
    });
    ctx.setLineDash([5 * ratio, 4 * ratio]);
    ctx.font = `${12 * ratio}px system-ui, sans-serif`;
    ctx.textAlign = "left";
    ctx.textBaseline = "alphabetic";
    ctx.strokeStyle = ctx.fillStyle = color("ink");
    ctx.lineWidth = ratio;
    for (const mark of c.marks) {
      const at = self.valToPos(mark.at, mark.axis, true);
      const text = `${mark.label} ${ticks(mark.axis === "x" ? c.x_unit : c.y_unit)(mark.at)}`;
      ctx.beginPath();
      if (mark.axis === "x") { ctx.moveTo(at, top); ctx.lineTo(at, top + height); }
      else { ctx.moveTo(left, at); ctx.lineTo(left + width, at); }
      ctx.stroke();
      const wide = ctx.measureText(text).width + 6 * ratio;
      if (mark.axis === "x") ctx.fillText(text, at + wide > left + width ? at - wide : at + 5 * ratio, top + 12 * ratio);
      else ctx.fillText(text, left + width - wide, at - 5 * ratio < top + 12 * ratio ? at + 14 * ratio : at - 5 * ratio);
    }
    ctx.restore();
  };
  const rangeOf = (c, key) => {
    const marks = c.marks.filter((m) => m.axis === key).map((m) => m.at);
    const ends = key === "y" ? c.lines.flatMap((l) => [...(l.low || []), ...(l.high || [])]).filter((v) => v != null) : [];
    const log = key === "x" ? c.log_x : c.log_y;
    return (self, min, max) => {
      if (key === "y" && c.share) return [0, 1];
      if (min == null) { if (!marks.length) return log ? [0.001, 1] : [0, 1]; min = max = marks[0]; }
      if (key === "x" && (min > c.x[0] || max < c.x[c.x.length - 1])) return [min, max]; // zoomed
      const all = [min, max, ...marks, ...ends].filter((v) => !log || v > 0);
      const low = Math.min(...all), high = Math.max(...all);
      if (log) { const pad = low === high ? 2 : key === "x" ? 1.05 : 1.25; return [low / pad, high * pad]; }
      if (key === "y") return [0, high > 0 ? high * 1.08 : 1];
      if (c.x_time) return [low, high > low ? high : low + 1];
      const room = high > low ? (high - low) * 0.06 : Math.abs(high) * 0.1 || 1;
      return [Math.max(0, low - room), high + room];
    };
  };
  const dataOf = (c) => [c.x, ...c.lines.map((l) => l.y.map((v) => v != null && (!c.log_y || v > 0) ? v : null))];
  const draw = (figure) => {
    const c = charts[+figure.dataset.chart];
    const plot = figure.querySelector(".plot"), caption = figure.querySelector("figcaption");
    const last = c.small && figure.matches(":last-child");
    const width = plot.clientWidth, height = c.small ? 112 : 240;
    if (!width) return;
    const options = {
      width, height: height + (last ? 20 : 0), padding: [8, 22, 0, 0],
      scales: {
        x: { time: false, distr: c.log_x ? 3 : 1, range: rangeOf(c, "x") },
        y: { distr: c.log_y ? 3 : 1, range: rangeOf(c, "y") },
      },
      axes: [axis(c, "x", c.small && !last), axis(c, "y")],
      series: [
        { label: "", value: (self, v) => v == null ? "" : c.x_time ? clock(c)(v) : words(c.x_unit)(v) },
        ...c.lines.map((l, k) => series(c, l, k)),
      ],
      legend: { live: true, mount: (self, el) => caption.append(el), markers: { width: 0, fill: (self, i) => color(c.lines[i - 1].color) } },
      cursor: { y: false, points: { size: 7 }, drag: { x: true, y: false }, ...(c.linked ? { sync: { key: c.linked, setSeries: false, scales: ["x", null] } } : {}) },
      hooks: { draw: [overlays(c)] },
    };
    drawn.set(figure, { chart: new uPlot(options, dataOf(c), plot), width });
  };
  const erase = (figure) => {
    const entry = drawn.get(figure);
    if (!entry) return;
    entry.chart.destroy();
    figure.querySelectorAll(".u-legend").forEach((e) => e.remove());
    drawn.delete(figure);
  };
  // ---- each chart as a table or a picture -------------------------------------------------------------------------
  const save = (name, href) => {
    const link = document.createElement("a");
    Object.assign(link, { download: name, href });
    link.click();
  };
  const csv = (c) => {
    const quoted = (v) => v == null ? "" : typeof v === "number" ? String(v) : `"${String(v).replace(/"/g, '""').replace(/^[=+@-]/, "'$&")}"`;
    const ends = c.lines.flatMap((l) => [l.name, ...(l.low ? [`${l.name}, low`] : []), ...(l.high ? [`${l.name}, high`] : [])]);
    const head = [`${c.x_label || "x"}, ${c.x_unit}`, ...ends.map((n) => `${n}, ${c.y_unit}`)];
    const rows = c.x.map((x, i) => [x, ...c.lines.flatMap((l) => [l.y[i], ...(l.low ? [l.low[i]] : []), ...(l.high ? [l.high[i]] : [])])]);
    return [head, ...rows].map((row) => row.map(quoted).join(",")).join("\n") + "\n";
  };
  const png = (figure) => {
    const drawing = figure.querySelector("canvas"), made = document.createElement("canvas");
    const c = charts[+figure.dataset.chart], ratio = devicePixelRatio, top = 44 * ratio;
    [made.width, made.height] = [drawing.width, drawing.height + top];
    const ctx = made.getContext("2d");
    ctx.fillStyle = getComputedStyle(document.body).backgroundColor;
    ctx.fillRect(0, 0, made.width, made.height);
    ctx.drawImage(drawing, 0, top);
    ctx.fillStyle = color("ink");
    ctx.font = `600 ${13 * ratio}px system-ui, sans-serif`;
    ctx.fillText(c.title, 8 * ratio, 17 * ratio);
    ctx.font = `${12 * ratio}px system-ui, sans-serif`;
    let at = 8 * ratio;
    for (const line of c.lines) {
      ctx.fillStyle = color(line.color);
      ctx.fillText(line.name, at, 35 * ratio);
      at += ctx.measureText(line.name).width + 14 * ratio;
    }
    return made.toDataURL("image/png");
  };
  const downloads = (figure) => {
    const c = charts[+figure.dataset.chart], name = c.title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "") || "chart";
    const box = document.createElement("div");
    box.className = "save screen";
    for (const [kind, href] of [["csv", () => "data:text/csv;charset=utf-8," + encodeURIComponent(csv(c))], ["png", () => png(figure)]]) {
      const button = document.createElement("button");
      Object.assign(button, { type: "button", textContent: kind.toUpperCase() });
      button.setAttribute("aria-label", `Save "${c.title}" as ${kind.toUpperCase()}`);
      button.addEventListener("click", () => save(`${name}.${kind}`, href()));
      box.append(button);
    }
    figure.append(box);
  };

  // ---- a test that runs (live.js): new numbers in the same charts; what is zoomed in or hidden stays so
  const renew = (next) => {
    for (const [figure, { chart }] of drawn) {
      const k = +figure.dataset.chart, was = charts[k].x, { min, max } = chart.scales.x;
      const zoomed = min > was[0] || max < was[was.length - 1];
      Object.assign(charts[k], next[k]);
      chart.setData(dataOf(charts[k]), !zoomed);
      if (zoomed) chart.redraw();
    }
    next.forEach((c, k) => Object.assign(charts[k], c));
  };
  window.report = { charts, renew };

  const figures = [...document.querySelectorAll("figure[data-chart]")];
  figures.forEach(downloads);
  const redraw = () => figures.forEach((f) => { erase(f); if (f.offsetParent !== null) draw(f); });
  const fit = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const figure = target.closest("figure"), entry = drawn.get(figure), width = target.clientWidth;
      if (!width) continue;
      if (!entry) draw(figure);
      else if (entry.width !== width) { entry.width = width; entry.chart.setSize({ width, height: entry.chart.height }); }
    }
  });
  figures.forEach((f) => fit.observe(f.querySelector(".plot")));

  // ---- tables ---------------------------------------------------------------------------------------------------------
  for (const table of document.querySelectorAll("table")) {
    const body = table.tBodies[0];
    if (!body || table.closest("figure")) continue;
    for (const k of (body.dataset.right || "").split(" ").filter(Boolean))
      for (const row of body.rows) row.cells[+k].classList.add("n");
    const heads = [...table.tHead.rows[0].cells];
    const first = [...body.rows];
    heads.forEach((head, k) => head.querySelector("button").addEventListener("click", () => {
      const was = head.getAttribute("aria-sort");
      const next = was === "ascending" ? "descending" : was === "descending" ? null : "ascending";
      heads.forEach((h) => h.removeAttribute("aria-sort"));
      if (!next) { body.append(...first); return; }
      head.setAttribute("aria-sort", next);
      const sign = next === "ascending" ? 1 : -1;
      const numbers = first.some((row) => row.cells[k].dataset.sort !== undefined);
      const key = (row) => {
        const cell = row.cells[k];
        if (numbers) return cell.dataset.sort === undefined ? null : +cell.dataset.sort;
        return cell.textContent.trim();
      };
      const compare = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === null || y === null) return (x === null) - (y === null); // not known stays last
        return sign * (numbers ? x - y : x.localeCompare(y, "en", { numeric: true }));
      };
      body.append(...[...first].sort(compare));
    }));
  }

  // ---- terms: a click, a key or a touch opens them by itself -----------------------------------------------------------
  for (const term of document.querySelectorAll(".term")) {
    const tip = document.getElementById(term.getAttribute("popovertarget"));
    if (!tip.showPopover) continue;
    const mouse = (wanted) => (e) => { if (e.pointerType === "mouse" && tip.matches(":popover-open") !== wanted) tip.togglePopover({ source: term }); };
    term.addEventListener("pointerenter", mouse(true));
    term.addEventListener("pointerleave", mouse(false));
  }

  // ---- light, dark, paper -----------------------------------------------------------------------------------------------
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
  const name = () => { button.textContent = isDark() ? "Light" : "Dark"; button.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`); };
  button.hidden = false;
  name();
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; name(); redraw(); });
  dark.addEventListener("change", () => { name(); redraw(); });
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    closed.forEach((d) => { d.open = true; });
    root.classList.add("printing");
    redraw();
  });
  addEventListener("afterprint", () => {
    closed.forEach((d) => { d.open = false; });
    root.classList.remove("printing");
    redraw();
  });
})();
