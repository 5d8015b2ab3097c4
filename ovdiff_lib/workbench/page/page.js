"use strict";
(() => {
  const NONE = 65535;
  const SVG = "http://www.w3.org/2000/svg";

  // Text goes in as text, never as markup: class names are whatever a user typed.
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children);
    return element;
  }

  const named = (text) => make("bdi", {}, text);
  const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;
  const clamp = (value, last) => Math.min(Math.max(value, 0), last);

  function swatch(colour) {
    const mark = make("span", { class: "swatch", "aria-hidden": "true" });
    mark.style.background = css(colour);
    return mark;
  }

  async function unpack(text, Type) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Type(await new Response(stream).arrayBuffer());
  }

  async function opened(entry) {
    const picture = new Image();
    picture.src = entry.picture;
    const [labels, winner, second, margin] = await Promise.all([
      unpack(entry.labels, Uint16Array), unpack(entry.winner, Uint16Array), unpack(entry.runner_up, Uint16Array),
      unpack(entry.margin, Uint8Array), picture.decode()]);
    return { entry, picture, labels, winner, second, margin, height: entry.grid[0], width: entry.grid[1] };
  }

  // A pixel of the commonest class that is not background, near the middle of its region.
  function first(image) {
    const counts = new Map();
    image.labels.forEach((label) => label && counts.set(label, (counts.get(label) || 0) + 1));
    const common = [...counts].sort((a, b) => b[1] - a[1])[0];
    if (!common) return [image.height >> 1, image.width >> 1];
    const pixels = [];
    image.labels.forEach((label, i) => {
      if (label === common[0]) pixels.push([Math.floor(i / image.width), i % image.width]);
    });
    const middle = [0, 1].map((axis) => pixels.reduce((sum, p) => sum + p[axis], 0) / pixels.length);
    const far = (p) => (p[0] - middle[0]) ** 2 + (p[1] - middle[1]) ** 2;
    return pixels.reduce((best, p) => (far(p) < far(best) ? p : best));
  }

  // What explain() says of the pixel.
  function explanation(image, row, column) {
    const i = row * image.width + column;
    const { entry } = image;
    const runner = image.second[i];
    return {
      label: image.labels[i], name: entry.classes[image.labels[i]], prototype: image.winner[i],
      runner: runner === NONE ? null : runner, second: runner === NONE ? null : entry.classes[runner],
      margin: image.margin[i] * entry.step,
      // Of an image that is shown smaller than it is, the pixel of the image that was looked up.
      row: Math.floor((row + 0.5) * entry.size[0] / image.height),
      column: Math.floor((column + 0.5) * entry.size[1] / image.width),
    };
  }

  function origin(prototype) {
    if (!prototype) return ["A constant background score, no prototype"];
    const article = prototype.kind === "instance" ? "An" : "A";
    const kind = { class: "class prototype, the mean of all support images",
                   instance: "instance prototype, the mean of one support image",
                   part: "part prototype, one cluster of features" }[prototype.kind];
    return prototype.region === "background"
      ? ["A background ", kind, ", from the surroundings in the support images of ", named(prototype.category)]
      : [`${article} ${kind}, of `, named(prototype.category)];
  }

  // A support image with the region the prototype was made from clear and outlined, the rest pale.
  function region(support, grid, source) {
    const [h, w] = grid;
    const bytes = atob(support.mask);
    const bit = (i) => (bytes.charCodeAt(i >> 3) >> (7 - (i & 7))) & 1;
    const inside = (y, x) => y >= 0 && x >= 0 && y < h && x < w && bit(y * w + x);
    let pale = "", edge = "";
    for (let y = 0; y < h; y++) for (let x = 0; x < w; x++) {
      if (!inside(y, x)) { pale += `M${x} ${y}h1v1h-1z`; continue; }
      if (!inside(y - 1, x)) edge += `M${x} ${y}h1`;
      if (!inside(y + 1, x)) edge += `M${x} ${y + 1}h1`;
      if (!inside(y, x - 1)) edge += `M${x} ${y}v1`;
      if (!inside(y, x + 1)) edge += `M${x + 1} ${y}v1`;
    }
    const drawing = document.createElementNS(SVG, "svg");
    drawing.setAttribute("viewBox", `0 0 ${w} ${h}`);
    drawing.setAttribute("role", "img");
    drawing.setAttribute("aria-label",
      `Support image ${support.image}, ${support.features} of ${h * w} features highlighted`);
    const part = (tag, values) => {
      const element = document.createElementNS(SVG, tag);
      for (const [name, value] of Object.entries(values)) element.setAttribute(name, value);
      drawing.append(element);
    };
    part("image", { href: source, width: w, height: h, preserveAspectRatio: "none" });
    part("path", { d: pale, fill: "#fff", "fill-opacity": 0.68, "shape-rendering": "crispEdges" });
    part("path", { d: edge, stroke: "#c2410c", "stroke-width": Math.max(w, h) / 60, fill: "none" });
    return drawing;
  }

  function queried(entry) {
    const dropped = entry.queried.filter((c) => !c.kept).length;
    const ran = entry.queried.some((c) => c.probability !== null);
    const chance = (p) => p === null ? "–" : p < 5e-5 ? "< 0.0001" : p.toFixed(4);
    const rows = entry.queried.map((c) => make("tr", { class: c.kept ? "" : "dropped" },
      make("th", { scope: "row" }, swatch(entry.colours[c.label]), named(c.name)),
      make("td", {}, chance(c.probability)), make("td", {}, c.kept ? "kept" : `dropped: ${c.reason}`)));
    const heads = ["class", "CLIP’s probability", "category filter"].map((name) =>
      make("th", { scope: "col" }, name));
    return make("details", { open: true },
      make("summary", {}, ran
        ? `Queried classes: ${entry.queried.length - dropped} kept, ${dropped} dropped by the category filter`
        : `Queried classes: ${entry.queried.length}; the category filter did not run`),
      make("div", { class: "scroll queried", tabindex: 0, role: "region", "aria-label": "Queried classes" },
        make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows))));
  }

  async function panel(box, data, broken) {
    const canvas = make("canvas", { tabindex: 0, role: "application" });
    const said = make("p", { class: "hidden", role: "status", "aria-live": "polite" });
    const answer = make("div", { class: "answer" });
    const rowField = make("input", { type: "number", min: 0, name: "row" });
    const columnField = make("input", { type: "number", min: 0, name: "column" });
    const shown = { image: null, row: 0, column: 0, view: "both" };
    const views = make("fieldset", {}, make("legend", {}, "Show"));
    views.append(...["image", "both", "labels"].map((view) => make("label", {},
      make("input", { type: "radio", name: `view-${box.dataset.panel}`, value: view, checked: view === shown.view,
                      onchange: () => { shown.view = view; draw(); } }), ` ${view}`)));
    const buttons = data.images.map((entry) => make("button",
      { type: "button", "aria-pressed": "false", onclick: () => choose(entry).catch(broken) },
      make("img", { src: entry.picture, alt: "" }), make("span", {}, named(entry.title))));
    const cache = new Map();

    let wanted = null;

    // Reading an image takes a moment; of several asked for meanwhile, the last one is shown.
    async function choose(entry) {
      wanted = entry;
      if (!cache.has(entry)) cache.set(entry, opened(entry));
      const image = await cache.get(entry);
      if (wanted !== entry) return;
      shown.image = image;
      buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(data.images[i] === entry)));
      canvas.setAttribute("aria-label", `${entry.title}: arrow keys move the pixel, with Shift by ten`);
      rowField.max = entry.size[0] - 1;
      columnField.max = entry.size[1] - 1;
      move(...first(shown.image));
    }

    function move(row, column) {
      shown.row = clamp(row, shown.image.height - 1);
      shown.column = clamp(column, shown.image.width - 1);
      draw();
      tell();
    }

    function draw() {
      const { image, row, column } = shown;
      const { width, height } = image;
      const scale = Math.max(1, Math.round(960 / Math.max(width, height)));
      canvas.width = width * scale;
      canvas.height = height * scale;
      canvas.style.maxWidth = `calc(75vh * ${width / height})`;
      const pen = canvas.getContext("2d");
      pen.drawImage(image.picture, 0, 0, canvas.width, canvas.height);
      if (shown.view !== "image") {
        const layer = new OffscreenCanvas(width, height), pixels = new ImageData(width, height);
        const opacity = shown.view === "both" ? 140 : 255;
        const colours = new Uint8ClampedArray(image.entry.colours.flatMap((colour) => [...colour, opacity]));
        for (let i = 0; i < image.labels.length; i++) {
          for (let c = 0; c < 4; c++) pixels.data[4 * i + c] = colours[4 * image.labels[i] + c];
        }
        layer.getContext("2d").putImageData(pixels, 0, 0);
        pen.imageSmoothingEnabled = false;
        pen.drawImage(layer, 0, 0, canvas.width, canvas.height);
      }
      const here = row * width + column;
      const same = (y, x) => y >= 0 && x >= 0 && y < height && x < width
        && image.winner[y * width + x] === image.winner[here] && image.labels[y * width + x] === image.labels[here];
      const line = (x, y, dx, dy) => {
        pen.moveTo(x * scale, y * scale);
        pen.lineTo((x + dx) * scale, (y + dy) * scale);
      };
      const stroke = (colour, thick) => {
        pen.strokeStyle = colour;
        pen.lineWidth = thick;
        pen.stroke();
      };
      pen.beginPath();
      for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) if (same(y, x)) {
        if (!same(y - 1, x)) line(x, y, 1, 0);
        if (!same(y + 1, x)) line(x, y + 1, 1, 0);
        if (!same(y, x - 1)) line(x, y, 0, 1);
        if (!same(y, x + 1)) line(x + 1, y, 0, 1);
      }
      stroke("#000", 5);
      stroke("#fff", 2.5);
      pen.beginPath();
      pen.arc((column + 0.5) * scale, (row + 0.5) * scale, 9, 0, 2 * Math.PI);
      stroke("#000", 6);
      stroke("#fff", 3);
    }

    function tell() {
      const why = explanation(shown.image, shown.row, shown.column);
      const { entry } = shown.image;
      const prototype = why.prototype === NONE ? null : data.prototypes[why.prototype];
      const second = why.second === null ? ["No other class was considered."]
        : ["Runner-up: ", swatch(entry.colours[why.runner]), named(why.second), `, ${why.margin.toFixed(3)} behind.`];
      const support = prototype ? prototype.support.map((s) => make("li", {},
        region(s, prototype.grid, data.pictures[s.picture]),
        `image ${s.image}: ${s.features} of ${prototype.grid[0] * prototype.grid[1]} features`)) : [];
      answer.replaceChildren(
        make("h4", {}, swatch(entry.colours[why.label]), named(why.name), ` at row ${why.row}, column ${why.column}`),
        make("p", { class: "prototype" }, ...origin(prototype),
          prototype ? ` (number ${prototype.index}, features of ${prototype.extractor}).` : "."),
        make("p", { class: "second" }, ...second),
        ...(support.length ? [make("p", { class: "note" }, prototype.images > support.length
          ? `Made from regions of ${prototype.images} support images of ${prototype.category}; `
            + `the ${support.length} largest:`
          : `The support regions of ${prototype.category} it was made from:`),
        make("ul", { class: "regions" }, ...support)] : []),
        queried(entry));
      rowField.value = why.row;
      columnField.value = why.column;
      const parts = ["h4", ".prototype", ".second"].map((part) => answer.querySelector(part).textContent);
      said.textContent = parts.join(". ");
    }

    canvas.addEventListener("click", (event) => {
      const area = canvas.getBoundingClientRect();
      move(Math.floor((event.clientY - area.top) / area.height * shown.image.height),
           Math.floor((event.clientX - area.left) / area.width * shown.image.width));
    });
    canvas.addEventListener("keydown", (event) => {
      const step = event.shiftKey ? 10 : 1;
      const { row, column, image } = shown;
      const target = { ArrowUp: [row - step, column], ArrowDown: [row + step, column], ArrowLeft: [row, column - step],
                       ArrowRight: [row, column + step], Home: [row, 0], End: [row, image.width - 1],
                       PageUp: [0, column], PageDown: [image.height - 1, column] }[event.key];
      if (!target || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      move(...target);
    });
    const typed = () => {
      const { image } = shown;
      move(Math.floor((Number(rowField.value) + 0.5) * image.height / image.entry.size[0]),
           Math.floor((Number(columnField.value) + 0.5) * image.width / image.entry.size[1]));
    };
    rowField.addEventListener("change", typed);
    columnField.addEventListener("change", typed);

    box.replaceChildren(
      ...(data.caption ? [make("p", { class: "caption" }, named(data.caption))] : []),
      make("div", { class: "choose", role: "group", "aria-label": "Images" }, ...buttons),
      make("div", { class: "two" },
        make("div", { class: "stage" }, canvas,
          make("div", { class: "controls" }, views, make("label", {}, "Row ", rowField),
            make("label", {}, "Column ", columnField)),
          make("p", { class: "note" }, "The outline holds the pixels that the same prototype decided.")),
        answer),
      said);
    if (data.images.length) await choose(data.images[0]);
  }

  for (const box of document.querySelectorAll(".panel")) {
    const data = JSON.parse(document.getElementById(`panel-${box.dataset.panel}`).textContent);
    if (!("DecompressionStream" in window)) continue;
    const broken = (error) =>
      box.replaceChildren(make("p", { class: "problem" },
        `The data of this panel cannot be read (${error.message}); write them again.`));
    panel(box, data, broken).then(() => { box.dataset.ready = "true"; }, broken);
  }

  // On a phone the contents would push the report off the screen; on paper everything that is folded shows.
  const contents = document.getElementById("contents");
  if (contents && matchMedia("(max-width: 63.99rem)").matches) contents.open = false;
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    folded.forEach((details) => { details.open = true; });
  });
  addEventListener("afterprint", () => folded.forEach((details) => { details.open = false; }));
})();
