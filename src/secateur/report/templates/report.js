"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const box = document.getElementById("details");
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];

  const element = (name, text = "", kind = "") => {
    const made = document.createElement(name);
    made.textContent = text;
    if (kind) made.className = kind;
    return made;
  };

  // --- details of the runs behind a row or a point -----------------------------------------------------------------

  const facts = (pairs) => {
    const list = element("dl", "", "facts");
    for (const [name, value] of pairs) list.append(element("dt", name), element("dd", value));
    return list;
  };

  const oneRun = (run) => [
    element("h3", run.title),
    facts(run.facts),
    element("h4", "Command"),
    element("pre", run.command || "not recorded"),
    element("h4", "Configuration"),
    Object.keys(run.config).length || Object.keys(data.common).length
      ? facts(Object.entries({ ...run.config, ...data.common }))
      : element("p", "not recorded"),
  ];

  const severalRuns = (runs, words) => {
    if (runs.length === 1) return oneRun(runs[0]);
    const first = runs[0].config;
    const same = Object.entries(first).filter(([k, v]) => runs.every((run) => run.config[k] === v));
    const shared = new Set(same.map(([k]) => k));
    const parts = [element("h3", words || `${runs.length} runs`)];
    for (const run of runs) {
      const part = element("details");
      part.append(element("summary", run.title));
      part.append(facts([...run.facts, ...Object.entries(run.config).filter(([k]) => !shared.has(k))]));
      parts.push(part);
    }
    parts.push(element("h4", "Commands"));
    parts.push(element("pre", runs.map((run) => run.command || "not recorded").join("\n")));
    parts.push(element("h4", `Configuration of all ${runs.length}`));
    parts.push(facts(same.concat(Object.entries(data.common))));
    return parts;
  };

  let kept = null;
  const show = (target) => {
    const runs = target.dataset.runs.split(" ").filter(Boolean).map((i) => data.runs[i]);
    if (!runs.length) return;
    const close = element("button", "Close", "close");
    close.type = "button";
    close.addEventListener("click", release);
    box.replaceChildren(close, ...severalRuns(runs, target.getAttribute("aria-label")));
    box.append(element("p", "Click, or press Enter, to keep this open; Escape closes it.", "hint"));
    box.hidden = false;
    box.scrollTop = 0;
    // Never over what it describes: in the corner where the pointer or the focus is not.
    const place = target.getBoundingClientRect();
    box.classList.toggle("left", target.localName !== "tr" && (place.left + place.right) / 2 > innerWidth / 2);
    box.classList.toggle("top", (place.top + place.bottom) / 2 > innerHeight / 2);
  };
  const release = () => {
    if (kept) {
      kept.classList.remove("kept");
      kept.focus?.({ preventScroll: true });
    }
    kept = null;
    box.classList.remove("kept");
    box.hidden = true;
  };
  const keep = (target) => {
    if (kept) kept.classList.remove("kept");
    kept = target;
    kept.classList.add("kept");
    show(target);
    box.classList.add("kept");
  };

  const runsOf = (event) => event.target.closest?.("[data-runs]");
  document.addEventListener("mouseover", (event) => { if (!kept && runsOf(event)) show(runsOf(event)); });
  document.addEventListener("mouseout", (event) => {
    if (!kept && runsOf(event) && !runsOf(event).contains(event.relatedTarget)) box.hidden = true;
  });
  document.addEventListener("focusin", (event) => { if (!kept && runsOf(event)) show(runsOf(event)); });
  document.addEventListener("focusout", (event) => { if (!kept && runsOf(event)) box.hidden = true; });
  document.addEventListener("click", (event) => {
    const target = runsOf(event);
    if (target) target === kept ? release() : keep(target);
  });

  // One stop of the tab key per table and chart; arrows go from row to row and from point to point.
  const items = (group) => all("[data-runs]", group).filter((item) => !item.classList.contains("out"));
  const groups = all("tbody, svg.chart");
  const firstStops = () => {
    for (const group of groups) items(group).forEach((item, i) => { item.tabIndex = i ? -1 : 0; });
  };
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return release();
    const target = event.target.closest?.("[data-runs]");
    if (!target) return undefined;
    if (event.key === "Enter") return target === kept ? release() : keep(target);
    const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
    const group = target.closest("tbody, svg.chart");
    if (!step || !group) return undefined;
    const others = items(group);
    const next = others[others.indexOf(target) + step];
    if (next) {
      event.preventDefault();
      target.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    }
    return undefined;
  });

  // --- sorting -------------------------------------------------------------------------------------------------------

  const sortValue = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
    return cell.classList.contains("num") ? null : cell.textContent;
  };
  const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
  const sort = (table, column) => {
    const heads = all("thead tr:last-child th", table);
    const falling = heads[column].getAttribute("aria-sort") === "ascending";
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", falling ? "descending" : "ascending");
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [sortValue(row, column), row]);
    // What has no value comes last, whichever way the others go.
    rows.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : (falling ? -1 : 1) * compare(a, b)));
    body.append(...rows.map(([, row]) => row));
    firstStops();
  };
  for (const table of all("table.sortable")) {
    all("thead tr:last-child th", table).forEach((head, column) => {
      const button = element("button", head.textContent);
      button.type = "button";
      button.addEventListener("click", () => sort(table, column));
      head.replaceChildren(button);
    });
  }

  // --- filtering -----------------------------------------------------------------------------------------------------

  const form = document.querySelector(".filters");
  const filtered = all("main [data-model]");
  const rows = filtered.filter((item) => item.localName === "tr");
  const apply = () => {
    const words = document.getElementById("find").value.trim().toLowerCase();
    const wanted = all("select", form).map((s) => [s.dataset.facet, s.value]).filter(([, value]) => value);
    for (const item of filtered) {
      const text = (item.localName === "tr" ? item.textContent : item.getAttribute("aria-label")) || "";
      const fits = wanted.every(([facet, value]) => (item.dataset[facet] ?? value) === value);
      item.classList.toggle("out", !(fits && (item.localName === "line" || text.toLowerCase().includes(words))));
    }
    const left = rows.filter((row) => !row.classList.contains("out")).length;
    form.querySelector("output").textContent = left === rows.length ? "" : `${left} of ${rows.length} rows`;
    firstStops();
  };
  form.hidden = false;
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(apply));
  apply();

  addEventListener("beforeprint", () => all("main details").forEach((part) => { part.open = true; }));
})();
