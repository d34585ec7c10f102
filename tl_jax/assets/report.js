"use strict";
// Tables sort by a click on a column and show the rows that a field asks for; figures tell what is under the pointer.
const make = (tag, name, text = "") => Object.assign(document.createElement(tag), { className: name, textContent: text });
const collator = new Intl.Collator("en", { numeric: true });
const NUMBER = /^(<?) ?([+-]?(?:inf|\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?))(?: ([kKMGTP])(i?)B?(?![a-z]))?/;
const TURNS = { none: "ascending", ascending: "descending", descending: "none" };

function number(text, whole) {
  const found = NUMBER.exec(text);
  if (!found || (whole && found[0] !== text)) return NaN;
  const power = found[3] ? 1 + "KMGTP".indexOf(found[3].toUpperCase()) : 0;
  const value = Number(found[2].replaceAll(",", "").replace("inf", "Infinity"));
  return value * (found[4] ? 1024 : 1000) ** power * (found[1] ? 0.999 : 1);
}

function sorted(rows, column, turn) {
  const text = row => row.cells[column].textContent.trim(), names = rows.some(row => row.cells[column].className !== "n");
  // A column of names counts as numbers only where all of it is numbers.
  const numbers = !names || rows.every(row => text(row) === "-" || !isNaN(number(text(row), true)));
  const keys = new Map(rows.map(row => [row, numbers ? number(text(row), names) : NaN]));
  return [...rows].sort((a, b) => {
    const x = keys.get(a), y = keys.get(b);
    if (isNaN(x) !== isNaN(y)) return isNaN(x) - isNaN(y); // what has no number is last, either way
    const order = x < y ? -1 : x > y ? 1 : isNaN(x) ? collator.compare(text(a), text(b)) : 0;
    return turn === "ascending" ? order : -order;
  });
}

function sortable(table) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = make("button", "", head.textContent);
    head.replaceChildren(button);
    head.ariaSort = "none";
    button.addEventListener("click", () => {
      const turn = TURNS[head.ariaSort];
      for (const other of heads) other.ariaSort = other === head ? turn : "none";
      body.append(...(turn === "none" ? rows : sorted([...body.rows], column, turn)));
    });
  });
}

// A word is found anywhere; one that ends in the number of a level, shots=5, is not found in shots=50.
const holds = (text, word) => text.split(word).slice(1).some(after => !/=[\d.]+$/.test(word) || !/^[\d.]/.test(after));

function filterable(table) {
  const rows = [...table.tBodies[0].rows], bar = make("div", "filter"), field = make("input", ""), count = make("output", "");
  if (rows.length < 3) return;
  Object.assign(field, { type: "search", placeholder: "filter rows", autocomplete: "off" });
  field.ariaLabel = "filter the rows of: " + table.caption.textContent;
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    const text = row => [...row.cells].map(cell => cell.textContent).join(" ").toLowerCase();
    for (const row of rows) row.hidden = !words.every(word => holds(text(row), word));
    count.textContent = words.length ? `${rows.filter(row => !row.hidden).length} of ${rows.length} rows` : "";
  });
  bar.append(field, count);
  table.parentNode.before(bar);
}

function telling(plot) {
  const places = JSON.parse(plot.dataset.places), ring = make("span", "ring"), tip = make("div", "tip");
  let now = -1;
  if (!places.length) return;
  const show = (at, texts = []) => {
    now = at;
    ring.hidden = tip.hidden = at < 0;
    if (at < 0) return;
    const [right, down] = places[at], box = plot.getBoundingClientRect(), x = right * box.width;
    for (const node of [ring, tip]) Object.assign(node.style, { left: 100 * right + "%", top: 100 * down + "%" });
    tip.textContent = texts.join("\n\n");
    const { width, height } = tip.getBoundingClientRect(), left = x + 12 + width < box.width ? 12 : Math.max(-x, -12 - width);
    tip.style.transform = `translate(${left}px, ${down * box.height < height + 12 ? 12 : -12 - height}px)`;
  };
  for (const name of ["pointermove", "pointerdown"]) plot.addEventListener(name, event => {
    const box = plot.getBoundingClientRect(), right = (event.clientX - box.left) / box.width, down = (event.clientY - box.top) / box.height;
    const far = places.map(place => Math.hypot((place[0] - right) * box.width, (place[1] - down) * box.height));
    const least = Math.min(...far), same = places.filter((place, i) => far[i] < least + 3); // marks that cover each other
    show(least < 24 ? far.indexOf(least) : -1, same.slice(0, 4).map(place => place[2]));
  });
  plot.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") show(-1);
    if (!step) return;
    event.preventDefault();
    const next = (Math.max(now, step < 0 ? 0 : -1) + step + places.length) % places.length;
    show(next, [places[next][2]]);
  });
  plot.addEventListener("pointerleave", event => event.pointerType === "mouse" && show(-1));
  plot.addEventListener("blur", () => show(-1));
  Object.assign(plot, { tabIndex: 0, role: "group", ariaLabel: "figure; arrow keys go from point to point" });
  tip.role = "status";
  plot.append(ring, tip);
  show(-1);
}

document.querySelectorAll(".table table").forEach(table => (filterable(table), sortable(table)));
document.querySelectorAll(".plot").forEach(telling);
