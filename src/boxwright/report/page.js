// What the page does beside being read: theme, values under the pointer, sorting, one class's curves, zoom, copying.
// It works without any of it.
"use strict";
(() => {
  const root = document.documentElement;
  const make = (name, className, text) => {
    const element = document.createElement(name);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const remembered = (key, value) => {
    try {  // a page opened as a file may have no storage
      if (value === undefined) return localStorage.getItem(key);
      localStorage.setItem(key, value);
    } catch { /* then it is asked again */ }
    return null;
  };

  // Theme
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  const stored = remembered("boxwright-theme");
  if (stored === "dark" || stored === "light") root.dataset.theme = stored;
  const addTheme = () => {
    const place = document.querySelector(".title");
    if (!place || place.querySelector(".theme")) return;
    const button = make("button", "theme");
    const tell = () => { button.textContent = dark() ? "Light theme" : "Dark theme"; };
    button.type = "button";
    button.addEventListener("click", () => {
      root.dataset.theme = dark() ? "light" : "dark";
      remembered("boxwright-theme", root.dataset.theme);
      tell();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", tell);
    tell();
    place.append(button);
  };

  // Values under the pointer
  const told = (value, share) => {
    if (value === undefined || !Number.isFinite(value)) return "–";
    if (share) return value.toFixed(3);
    if (Number.isInteger(value)) return value.toLocaleString("en");
    const short = value.toPrecision(4);
    return Math.abs(value) < 1 && Math.abs(value) >= 0.001 ? value.toFixed(3) : String(Number(short));
  };
  const range = (text) => text.split(" ").map(Number);
  const values = (text) => (text ? text.split(" ").map((v) => (v === "-" ? NaN : Number(v))) : []);
  const addReadout = (figure) => {
    const svg = figure.querySelector(":scope > svg[data-x]");
    const legend = figure.querySelector(".legend");
    if (!svg || !legend) return;
    const lines = [...svg.querySelectorAll("path[data-xs]")];
    const outputs = [...legend.querySelectorAll("li:not([data-label]) output")];
    const last = outputs.map((output) => output.textContent);
    const at = legend.querySelector(".at");
    const label = at.parentElement.dataset.label;
    const [low, high, start, end] = range(svg.dataset.x);
    const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
    const [, , bottom, top] = range(svg.dataset.y);
    cursor.setAttribute("class", "cursor");
    cursor.setAttribute("y1", top);
    cursor.setAttribute("y2", bottom);
    cursor.setAttribute("visibility", "hidden");
    svg.append(cursor);
    let place = null;
    const points = () => [...new Set(lines.flatMap((line) => values(line.dataset.xs)))].sort((a, b) => a - b);
    const show = (x) => {
      const all = points();
      if (!all.length) return;
      place = all.reduce((best, v) => (Math.abs(v - x) < Math.abs(best - x) ? v : best), all[0]);
      const position = start + ((place - low) / (high - low)) * (end - start);
      cursor.setAttribute("x1", position);
      cursor.setAttribute("x2", position);
      cursor.setAttribute("visibility", "visible");
      at.textContent = `${label} ${told(place)}`;
      lines.forEach((line, i) => {
        const xs = values(line.dataset.xs);
        const ys = values(line.dataset.ys);
        const near = xs.reduce((best, v, j) => (Math.abs(v - place) < Math.abs(xs[best] - place) ? j : best), 0);
        const apart = xs.length > 1 ? (high - low) / 40 : Infinity;
        if (outputs[i]) outputs[i].textContent = Math.abs(xs[near] - place) <= apart ? told(ys[near], "share" in svg.dataset) : "–";
      });
    };
    const leave = () => {
      cursor.setAttribute("visibility", "hidden");
      at.textContent = "";
      place = null;
      outputs.forEach((output, i) => { output.textContent = last[i]; });
    };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const unit = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      show(low + ((unit - start) / (end - start)) * (high - low));
    });
    svg.addEventListener("pointerleave", leave);
    svg.setAttribute("tabindex", "0");
    svg.addEventListener("blur", leave);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const all = points();
      const index = place === null ? (step > 0 ? -1 : all.length) : all.indexOf(place);
      show(all[Math.min(Math.max(index + step, 0), all.length - 1)]);
    });
    figure.tell = (texts) => {
      lines.forEach((line, i) => { last[i] = texts[line.dataset.key]; });
      leave();
    };
  };

  // One class's curves
  const addPicker = (figures) => {
    const source = document.getElementById("curves-data");
    if (!source || !figures.length) return;
    const data = JSON.parse(source.textContent);
    if (data.classes.length < 3) return;
    const selects = [];
    const draw = (index) => {
      const one = data.classes[index];
      for (const figure of figures) {
        const svg = figure.querySelector("svg[data-x]");
        const [xLow, xHigh, xStart, xEnd] = range(svg.dataset.x);
        const [yLow, yHigh, yStart, yEnd] = range(svg.dataset.y);
        const place = (x) => xStart + ((x - xLow) / (xHigh - xLow)) * (xEnd - xStart);
        for (const line of svg.querySelectorAll("path[data-key]")) {
          const ys = one[line.dataset.key];
          if (!ys) continue;
          const xs = line.dataset.key === "best_precision" ? data.recalls : data.thresholds;
          let path = "";
          let pen = "M";
          ys.forEach((y, i) => {
            if (y === null) { pen = "M"; return; }
            path += `${pen}${place(xs[i]).toFixed(1)} ${(yStart + ((y - yLow) / (yHigh - yLow)) * (yEnd - yStart)).toFixed(1)}`;
            pen = "L";
          });
          line.setAttribute("d", path || "M0 0");
          line.dataset.ys = ys.map((y) => (y === null ? "-" : y)).join(" ");
        }
        for (const dot of svg.querySelectorAll("circle")) dot.remove();
        const rule = svg.querySelector("g[data-key=at]");
        if (rule) {
          rule.setAttribute("visibility", one.at === null ? "hidden" : "visible");
          if (one.at !== null) {
            const x = place(one.at);
            const text = rule.querySelector("text");
            const mark = rule.querySelector("line");
            mark.setAttribute("x1", x);
            mark.setAttribute("x2", x);
            text.setAttribute("x", x);
            text.setAttribute("class", `mark ${x < xStart + 60 ? "start" : x > xEnd - 60 ? "end" : "middle"}`);
            text.textContent = `best F1 at ${one.at.toFixed(3)}`;
          }
        }
        figure.tell(one.told);
      }
      for (const select of selects) select.value = String(index);
    };
    for (const figure of figures) {
      const label = make("label", "pick", "Class ");
      const select = make("select");
      data.classes.forEach((one, i) => {
        const option = make("option", "", one.name.length > 60 ? one.name.slice(0, 59) + "…" : one.name);
        option.value = String(i);
        select.append(option);
      });
      select.addEventListener("change", () => draw(Number(select.value)));
      label.append(select);
      figure.querySelector("h3").after(label);
      selects.push(select);
    }
  };

  // Sorting
  const addSorting = (table) => {
    const heads = [...table.tHead.rows[0].cells];
    const body = table.tBodies[0];
    heads.forEach((head, column) => {
      if (!head.textContent.trim()) return;
      const button = make("button", "", head.textContent);
      button.type = "button";
      head.textContent = "";
      head.append(button);
      button.addEventListener("click", () => {
        const key = (row) => { const cell = row.cells[column]; return cell.dataset.v ?? cell.textContent; };
        const numeric = (text) => (text === "" || text === "–" ? NaN : Number(text.replaceAll(",", "")));
        const rows = [...body.rows];
        const numbers = rows.every((row) => { const text = key(row); return text === "" || text === "–" || Number.isFinite(numeric(text)); });
        const first = numbers ? "descending" : "ascending";
        const now = head.getAttribute("aria-sort");
        const order = now === null ? first : now === "ascending" ? "descending" : "ascending";
        const sign = order === "ascending" ? 1 : -1;
        rows.sort((a, b) => {
          if (!numbers) return sign * key(a).localeCompare(key(b));
          const [x, y] = [numeric(key(a)), numeric(key(b))];
          if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);  // what is not known comes last
          return sign * (x - y);
        });
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", order);
        body.append(...rows);
      });
    });
  };

  // Zoom
  let dialog = null;
  const zoom = (image) => {
    if (!dialog) {
      dialog = make("dialog");
      dialog.addEventListener("click", () => dialog.close());
      document.body.append(dialog);
    }
    const large = make("img");
    large.src = image.src;
    large.alt = image.alt;
    dialog.replaceChildren(large);
    dialog.setAttribute("aria-label", image.alt);
    dialog.showModal();
  };
  const addZoom = (image) => {
    image.tabIndex = 0;
    image.setAttribute("role", "button");
    image.title = "Enlarge";
    image.addEventListener("click", () => zoom(image));
    image.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      zoom(image);
    });
  };

  // Copying
  const addCopy = (command) => {
    if (!navigator.clipboard) return;
    const button = make("button", "copy", "Copy");
    button.type = "button";
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(command.querySelector("code").textContent);
        button.textContent = "Copied";
      } catch {
        button.textContent = "Not allowed here";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
    command.prepend(button);
  };

  const done = new WeakSet();  // a page that is watched gets new parts beside old ones
  const fresh = (selector) => [...document.querySelectorAll(selector)].filter((element) => !done.has(element));
  const enliven = () => {
    addTheme();
    const graphs = fresh("figure.graph");
    graphs.forEach(addReadout);
    addPicker(graphs.filter((graph) => graph.dataset.picker === "curves"));
    const others = [[fresh("table.sortable"), addSorting], [fresh(".picture img"), addZoom], [fresh("pre.command"), addCopy]];
    for (const [elements, add] of others) elements.forEach(add);
    for (const element of [...graphs, ...others.flatMap(([elements]) => elements)]) done.add(element);
  };
  enliven();
  document.addEventListener("boxwright-renewed", enliven);
})();
