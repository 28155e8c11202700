// Decisions on suspects: by buttons and keys, kept by the browser where it may, undone, and exported as JSON lines.
"use strict";
const WORDS = ["keep", "flip", "drop"];
const list = document.querySelector(".suspects"), key = `prm-hf suspects ${list.dataset.key}`;
const cards = [...list.querySelectorAll(".card")], rows = new Map(cards.map((card) => [Number(card.dataset.row), card]));
const count = document.getElementById("count"), undo = document.getElementById("undo");
const save = document.getElementById("export"), shortcuts = document.getElementById("shortcuts");
const decisions = new Map(), changes = [];  // a change is a row and its decision before
let current = -1, isKept = true, isExported = true;

function store() {
  const kept = [...rows].map(([row, card]) => [row, decisions.get(row) ?? null, card.dataset.decided]);
  const changed = kept.filter(([, word, before]) => word || before).map(([row, word]) => [row, word]);
  try { localStorage.setItem(key, JSON.stringify(changed)); } catch { isKept = false; }  // pages of files may not
  document.getElementById("storage").hidden = isKept || !decisions.size;
}

// First what the page was written with, then what was decided in this browser, null where it was taken back.
function restore() {
  for (const [row, card] of rows) if (card.dataset.decided) decisions.set(row, card.dataset.decided);
  const before = [...decisions];
  try {
    for (const [row, word] of JSON.parse(localStorage.getItem(key) ?? "[]")) {
      if (word === null) decisions.delete(row);
      else if (rows.has(row) && allows(rows.get(row), word)) decisions.set(row, word);
    }
  } catch { decisions.clear(); for (const [row, word] of before) decisions.set(row, word); }
}

function allows(card, word) {
  return WORDS.includes(word) && card.querySelector(`[data-decision="${word}"]`) !== null;
}

function show() {
  const totals = {keep: 0, flip: 0, drop: 0};
  for (const [row, card] of rows) {
    const word = decisions.get(row);
    if (word) { card.dataset.decision = word; totals[word] += 1; } else delete card.dataset.decision;
    for (const button of card.querySelectorAll("[data-decision]"))
      button.setAttribute("aria-pressed", String(button.dataset.decision === word));
  }
  const parts = WORDS.filter((word) => totals[word]).map((word) => `${totals[word]} ${word}`);
  count.textContent = `${decisions.size} of ${rows.size} decided` + (parts.length ? `: ${parts.join(", ")}` : "");
  undo.disabled = !changes.length;
  save.disabled = !decisions.size;
}

function set(row, word) {
  if (word) decisions.set(row, word); else decisions.delete(row);
  isExported = false;
  store();
  show();
}

function decide(card, word) {
  const row = Number(card.dataset.row), before = decisions.get(row);
  if (before === word) return;
  changes.push([row, before]);
  set(row, word);
}

function goTo(index) {
  current = Math.max(0, Math.min(index, cards.length - 1));
  cards.forEach((card, i) => card.classList.toggle("current", i === current));
  cards[current].focus({preventScroll: true});
  cards[current].scrollIntoView({block: "start"});
}

function takeBack() {
  if (!changes.length) return;
  const [row, before] = changes.pop();
  set(row, before);
  goTo(cards.indexOf(rows.get(row)));
}

function fold(card, isOpen) {
  const button = card.querySelector(".more");
  if (!button) return;
  card.classList.toggle("open", isOpen);
  button.setAttribute("aria-expanded", String(isOpen));
  button.textContent = isOpen ? "Show less" : "Show all";
}

function exportDecisions() {
  const lines = cards.map((card) => Number(card.dataset.row)).filter((row) => decisions.has(row))
    .map((row) => JSON.stringify({row, decision: decisions.get(row)}) + "\n");
  const url = URL.createObjectURL(new Blob(lines, {type: "application/jsonl"}));
  Object.assign(document.createElement("a"), {href: url, download: "decisions.jsonl"}).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
  isExported = true;
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || !shortcuts.checked || event.target.closest("input")) return;
  const pressed = event.key.toLowerCase(), word = WORDS["123".indexOf(pressed)], card = cards[current];
  if (pressed === "j" || pressed === "arrowright") goTo(current + 1);
  else if (pressed === "k" || pressed === "arrowleft") goTo(current - 1);
  else if (pressed === "u") takeBack();
  else if (!card) return;
  else if (pressed === "0") decide(card, undefined);
  else if (pressed === "e") fold(card, !card.classList.contains("open"));
  else if (word && "123".includes(pressed) && allows(card, word)) {
    decide(card, word);
    if (current + 1 < cards.length) goTo(current + 1);
  } else return;
  event.preventDefault();
}

list.addEventListener("click", (event) => {
  const button = event.target.closest("button"), card = event.target.closest(".card");
  if (!button || !card) return;
  if (button.matches(".more")) return fold(card, !card.classList.contains("open"));
  const word = button.dataset.decision;
  decide(card, decisions.get(Number(card.dataset.row)) === word ? undefined : word);
});
list.addEventListener("focusin", (event) => {
  current = cards.indexOf(event.target.closest(".card"));
  cards.forEach((card, i) => card.classList.toggle("current", i === current));
});
undo.addEventListener("click", takeBack);
save.addEventListener("click", exportDecisions);
document.addEventListener("keydown", onKey);
addEventListener("beforeunload", (event) => { if (!isKept && !isExported && decisions.size) event.preventDefault(); });

document.documentElement.classList.add("scripted");
for (const button of document.querySelectorAll(".more")) button.hidden = false;
if (matchMedia("(max-width: 760px)").matches) document.querySelector(".how").open = false;
restore();
store();
show();
