"use strict";
(() => {
  const NONE = 65535;
  const DRAWN = new Set(["svg", "image", "path", "circle"]);

  // Text goes in as text, never as markup: class names are whatever a user typed.
  function make(tag, attributes = {}, ...children) {
    const element = DRAWN.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag)
      : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  const named = (text) => make("bdi", {}, text);

  function swatch([red, green, blue]) {
    const mark = make("span", { class: "swatch", "aria-hidden": "true" });
    mark.style.background = `rgb(${red} ${green} ${blue})`;
    return mark;
  }

  async function unpack(text) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint16Array(await new Response(stream).arrayBuffer());
  }

  // An image with its maps read and its labels painted.
  async function opened(entry) {
    const [height, width] = entry.size;
    const [labels, winner, second, margin] = await Promise.all(
      [entry.labels, entry.winner, entry.runner_up, entry.margin].map(unpack));
    const layer = make("canvas", { width, height });
    const pixels = new ImageData(width, height);
    labels.forEach((label, i) => pixels.data.set([...entry.colours[label], 140], 4 * i));
    layer.getContext("2d").putImageData(pixels, 0, 0);
    return { entry, height, width, labels, winner, second, margin, painted: layer.toDataURL() };
  }

  // The border of a region of a grid as the path of an SVG.
  function outline(height, width, region) {
    const inside = (y, x) => y >= 0 && x >= 0 && y < height && x < width && region(y, x);
    let path = "";
    for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) if (inside(y, x)) {
      if (!inside(y - 1, x)) path += `M${x} ${y}h1`;
      if (!inside(y + 1, x)) path += `M${x} ${y + 1}h1`;
      if (!inside(y, x - 1)) path += `M${x} ${y}v1`;
      if (!inside(y, x + 1)) path += `M${x + 1} ${y}v1`;
    }
    return path;
  }

  const ARTICLES = { class: "A class prototype, the mean of all support images",
                     instance: "An instance prototype, the mean of one support image",
                     part: "A part prototype, one cluster of features" };

  function origin(prototype) {
    if (!prototype) return ["A constant background score, no prototype."];
    const from = prototype.region === "background" ? ", of the background in support images of " : ", of ";
    return [ARTICLES[prototype.kind], from, named(prototype.category),
            ` (number ${prototype.index}, features of ${prototype.extractor}).`];
  }

  // A support image with the region the prototype was made from clear and outlined, the rest pale.
  function region(support, [height, width], source) {
    const bytes = atob(support.mask);
    const inside = (y, x) => (bytes.charCodeAt((y * width + x) >> 3) >> (7 - ((y * width + x) & 7))) & 1;
    let pale = "";
    for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) if (!inside(y, x)) pale += `M${x} ${y}h1v1h-1z`;
    const said = `image ${support.image}: ${support.features} of ${height * width} features`;
    return make("li", {},
      make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Support ${said}` },
        make("image", { href: source, width, height, preserveAspectRatio: "none" }),
        make("path", { d: pale, fill: "#fff", "fill-opacity": 0.68, "shape-rendering": "crispEdges" }),
        make("path", { d: outline(height, width, inside), class: "border" })), said);
  }

  function queried(entry) {
    const kept = entry.queried.filter((c) => !c.reason).length;
    const rows = entry.queried.map((c) => make("tr", {},
      make("th", { scope: "row" }, swatch(entry.colours[c.label]), named(c.name)),
      make("td", {}, c.probability === null ? "–" : c.probability.toFixed(4)),
      make("td", {}, c.reason ? `dropped: ${c.reason}` : "kept")));
    const heads = ["class", "CLIP’s probability", "category filter"].map((name) => make("th", { scope: "col" }, name));
    return [make("h4", {}, `Queried classes: ${kept} kept, ${rows.length - kept} dropped by the category filter`),
            make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Queried classes" },
              make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows)))];
  }

  async function panel(box, data, broken) {
    const picture = make("image", { preserveAspectRatio: "none" }), painted = make("image", { class: "painted" });
    const black = make("path", { class: "black" }), white = make("path", { class: "white" });
    const mark = make("circle", { class: "white" });
    const stage = make("svg", { tabindex: 0, role: "application" }, picture, painted, black, white, mark);
    const told = make("div", { role: "status" }), regions = make("div"), filter = make("div");
    const toggle = make("input", { type: "checkbox", checked: "",
                                   onchange: () => { painted.style.display = toggle.checked ? "" : "none"; } });
    const buttons = data.images.map((entry) => make("button",
      { type: "button", "aria-pressed": "false", onclick: () => choose(entry).catch(broken) },
      make("img", { src: entry.picture, alt: "" }), named(entry.title)));
    let image = null, wanted = null, row = 0, column = 0;

    // Reading an image takes a moment; of several asked for meanwhile, the last one is shown.
    async function choose(entry) {
      wanted = entry;
      const read = await opened(entry);
      if (wanted !== entry) return;
      image = read;
      const { width, height } = image;
      buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(data.images[i] === entry)));
      stage.setAttribute("viewBox", `0 0 ${width} ${height}`);
      stage.setAttribute("aria-label", `${entry.title}: arrow keys move the pixel, with Shift by ten`);
      for (const [layer, href] of [[picture, entry.picture], [painted, image.painted]]) {
        for (const [name, value] of Object.entries({ href, width, height })) layer.setAttribute(name, value);
      }
      mark.setAttribute("r", Math.max(width, height) / 80);
      filter.replaceChildren(...queried(entry));
      move(height >> 1, width >> 1);
    }

    function move(toRow, toColumn) {
      const { entry, height, width, labels, winner, second, margin } = image;
      row = Math.min(Math.max(toRow, 0), height - 1);
      column = Math.min(Math.max(toColumn, 0), width - 1);
      const here = row * width + column;
      const path = outline(height, width, (y, x) => winner[y * width + x] === winner[here]
        && labels[y * width + x] === labels[here]);
      black.setAttribute("d", path);
      white.setAttribute("d", path);
      mark.setAttribute("cx", column + 0.5);
      mark.setAttribute("cy", row + 0.5);
      const prototype = data.prototypes[winner[here]];  // none has the number NONE
      const behind = second[here] === NONE ? ["No other class was considered."]
        : ["Runner-up: ", swatch(entry.colours[second[here]]), named(entry.classes[second[here]]),
           `, ${(margin[here] / 1000).toFixed(3)} behind.`];
      told.replaceChildren(
        make("h4", {}, swatch(entry.colours[labels[here]]), named(entry.classes[labels[here]]),
          ` at row ${row}, column ${column}`),
        make("p", { class: "prototype" }, ...origin(prototype)), make("p", { class: "second" }, ...behind));
      regions.replaceChildren(...(prototype ? [
        make("p", { class: "note" }, `Made from regions of ${prototype.images} support images; the largest:`),
        make("ul", {}, ...prototype.support.map((s) => region(s, prototype.grid, data.pictures[s.picture])))] : []));
    }

    stage.addEventListener("click", (event) => {
      const area = stage.getBoundingClientRect();
      move(Math.floor((event.clientY - area.top) / area.height * image.height),
           Math.floor((event.clientX - area.left) / area.width * image.width));
    });
    stage.addEventListener("keydown", (event) => {
      const step = event.shiftKey ? 10 : 1;
      const target = { ArrowUp: [row - step, column], ArrowDown: [row + step, column], ArrowLeft: [row, column - step],
                       ArrowRight: [row, column + step], Home: [row, 0], End: [row, image.width - 1],
                       PageUp: [0, column], PageDown: [image.height - 1, column] }[event.key];
      if (!target || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      move(...target);
    });

    await choose(data.images[0]);
    box.replaceChildren(
      make("p", { class: "note" }, named(data.caption)),
      make("div", { class: "choose", role: "group", "aria-label": "Images" }, ...buttons),
      make("div", { class: "two" },
        make("div", {}, stage, make("label", {}, toggle, " labels"),
          make("p", { class: "note" }, "The outline holds the pixels that the same prototype decided.")),
        make("div", {}, told, regions, filter)));
  }

  for (const box of document.querySelectorAll(".panel")) {
    const data = JSON.parse(document.getElementById(`panel-${box.dataset.panel}`).textContent);
    const broken = (error) => box.replaceChildren(make("p", { class: "problem" },
      `The data of this panel cannot be read (${error.message}); write them again.`));
    panel(box, data, broken).then(() => { box.dataset.ready = "true"; }, broken);
  }
})();
