// Sends a photograph and statements to /ask and shows P(true) of each statement.
"use strict";

const $ = (id) => document.getElementById(id);
const conditions = JSON.parse(document.body.dataset.conditions); // [condition, label] in the order shown
const maxBytes = Number(document.body.dataset.maxBytes);
const maxStatements = Number(document.body.dataset.maxStatements);
let chosen = null; // the photograph, a File
let question = null; // the AbortController of the question that waits for its answer

function fail(words, field) {
  $("error").hidden = false;
  $("error").textContent = words;
  $("status").textContent = "";
  if (field) $(field).focus();
}

function clear() {
  $("error").hidden = true;
  $("error").textContent = "";
  $("status").textContent = "";
}

function choose(file) {
  stopAsking(); // an answer about the previous photograph must not appear beside this one
  clear();
  $("answers").hidden = true;
  chosen = file;
  if ($("preview").src) URL.revokeObjectURL($("preview").src);
  $("preview").hidden = $("empty").hidden = true;
  $("preview").src = URL.createObjectURL(file);
  $("preview").hidden = false;
}

// Takes files that were dropped or pasted as if they had been chosen in the file field.
function take(files) {
  if (!files.length) return;
  if (files.length > 1) return fail("One photograph at a time, please.");
  const held = new DataTransfer();
  held.items.add(files[0]);
  $("file").files = held.files; // the field then shows the file's name
  choose(files[0]);
}

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error(`The file cannot be read: ${reader.error.message}`));
    reader.readAsDataURL(file);
  });
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function answerItem(answer) {
  const item = element("li");
  item.append(element("h3", "", answer.statement));
  const rows = element("dl");
  for (const [condition, label] of conditions) {
    const p = answer.p_true[condition];
    const row = element("div", `row ${condition}`);
    row.append(element("dt", "", label));
    const track = element("dd", "track");
    track.setAttribute("aria-hidden", "true"); // the number beside it says the same
    const fill = element("div", "fill");
    requestAnimationFrame(() => requestAnimationFrame(() => { fill.style.width = `${100 * p}%`; }));
    track.append(fill, element("div", "half"));
    const figure = element("dd", "figure");
    figure.append(element("b", "", `${(100 * p).toFixed(1)}\u00a0%`), " ", element("small", "", p > 0.5 ? "true" : "not true"));
    row.append(track, figure);
    rows.append(row);
  }
  item.append(rows);
  return item;
}

async function ask(signal) {
  const statements = $("statements").value.split("\n").map((s) => s.trim()).filter(Boolean);
  if (!chosen) return fail("Choose a photograph first.", "file");
  if (!statements.length) return fail("Write a statement first, such as: The cat is left of the laptop.", "statements");
  if (statements.length > maxStatements) return fail(`At most ${maxStatements} statements at once; these are ${statements.length}.`);
  if (chosen.size > maxBytes) return fail(`The photograph has ${chosen.size.toLocaleString("en")} bytes; at most ${maxBytes.toLocaleString("en")} are read.`);
  clear();
  $("status").textContent = "Asking the model …";
  const start = performance.now();
  let reply;
  try {
    const body = JSON.stringify({ photograph: await base64(chosen), statements });
    const response = await fetch("/ask", { method: "POST", headers: { "Content-Type": "application/json" }, body, signal });
    reply = await response.json();
  } catch (error) {
    if (signal.aborted) return;
    return fail(`No answer came: ${error.message}. Is tools/ask.py still running?`);
  }
  if (signal.aborted) return;
  if (reply.error) return fail(reply.error);
  $("list").replaceChildren(...reply.answers.map(answerItem));
  $("answers").hidden = false;
  const count = reply.answers.length === 1 ? "1 statement" : `${reply.answers.length} statements`;
  const seconds = (performance.now() - start) / 1000;
  $("status").textContent = `${count} answered below in ${seconds.toFixed(seconds < 1 ? 2 : 1)} s.`;
}

function stopAsking() {
  if (question) question.abort();
  question = null;
  $("ask").removeAttribute("aria-disabled");
}

async function askOnce() {
  if (question) return;
  const own = question = new AbortController();
  $("ask").setAttribute("aria-disabled", "true"); // `disabled` would take the keyboard focus away
  try {
    await ask(own.signal);
  } finally {
    if (question === own) stopAsking();
  }
}

// Text that goes to the statements field stays there, even if a picture comes along, as spreadsheets send both.
function isForTextField(event, data) {
  return event.target === $("statements") && data.types.includes("text/plain");
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  askOnce();
});
$("statements").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) askOnce();
});
$("file").addEventListener("change", () => {
  if ($("file").files.length) choose($("file").files[0]);
});
$("preview").addEventListener("error", () => {
  $("preview").hidden = true;
  $("empty").textContent = `${chosen.name}: the browser cannot show it.`;
  $("empty").hidden = false;
});
for (const kind of ["dragover", "drop"]) {
  document.addEventListener(kind, (event) => {
    if (isForTextField(event, event.dataTransfer)) return;
    event.preventDefault(); // otherwise the browser leaves the page and opens the file
    const files = event.dataTransfer.types.includes("Files");
    $("drop").classList.toggle("over", files && kind === "dragover");
    if (kind === "drop") take(event.dataTransfer.files);
  });
}
document.addEventListener("dragleave", () => $("drop").classList.remove("over"));
document.addEventListener("paste", (event) => {
  if (!isForTextField(event, event.clipboardData)) take(event.clipboardData.files);
});
