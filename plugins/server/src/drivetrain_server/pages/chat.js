// The chat: sends what was said, shows what comes, and lets it be stopped.
"use strict";

const $ = (id) => document.getElementById(id);
const talk = $("talk"), scroll = $("scroll"), prompt = $("prompt");
let turns = store.get("turns", []);
let model = null, running = null;

const settings = Object.assign({ system: "", temperature: 0.7, topP: 0.95, most: 1024 }, store.get("settings", {}));

async function begin() {
  try {
    const answer = await fetch("/v1/models", { headers: headers() });
    if (answer.status === 401) { $("settings").showModal(); $("key").focus(); return; }
    model = (await answer.json()).data[0];
    $("model").textContent = document.title = model.id;
    $("state").className = "dot ok";
  } catch { $("state").className = "dot bad"; $("model").textContent = "not reached"; }
}

function atEnd() { return scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 90; }
function toEnd() { scroll.scrollTop = scroll.scrollHeight; }

function button(text, act) {
  const element = make("button", "plain", text);
  element.type = "button";
  element.addEventListener("click", act);
  return element;
}

function show(turn) {
  $("welcome").hidden = true;
  const element = make("article", "turn " + turn.role);
  talk.append(element);
  fill(element, turn, false);
  return element;
}

function fill(element, turn, live) {
  element.replaceChildren();
  if (turn.role === "user") { element.textContent = turn.content; return; }
  if (turn.content) {
    const text = make("div", "text");
    text.append(markdown(turn.content));
    element.append(text);
  } else if (live) {
    const waiting = make("span", "waiting");
    waiting.append(make("i"), make("i"), make("i"));
    element.append(waiting);
  }
  if (turn.error) element.append(make("div", "error", turn.error));
  if (live) return;
  const under = make("div", "under");
  if (turn.facts) under.append(make("span", "", turn.facts));
  if (turn.content) under.append(button("Copy", () => navigator.clipboard.writeText(turn.content)));
  if (turn === turns[turns.length - 1]) under.append(button("Again", again));
  element.append(under);
}

function redraw() {
  talk.querySelectorAll(".turn").forEach((each) => each.remove());
  $("welcome").hidden = turns.length > 0;
  turns.forEach(show);
}

function asked() {
  const known = turns.filter((turn) => turn.role === "user" || turn.content);
  const messages = known.map(({ role, content }) => ({ role, content }));
  if (settings.system.trim()) messages.unshift({ role: "system", content: settings.system });
  const common = {
    model: model.id, stream: true, stream_options: { include_usage: true },
    temperature: settings.temperature, top_p: settings.topP, max_tokens: settings.most,
  };
  // A model without a chat template only continues texts.
  if (!model.chat) return ["/v1/completions", { ...common, prompt: messages.map((each) => each.content).join("\n") }];
  return ["/v1/chat/completions", { ...common, messages }];
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function sayFacts(turn, began, first, tokens) {
  const end = performance.now(), facts = [];
  if (first) facts.push(((first - began) / 1000).toFixed(2) + " s to the first token");
  if (first && tokens > 1 && end > first) facts.push(((tokens - 1) / ((end - first) / 1000)).toFixed(1) + " tokens/s");
  turn.facts = facts.join(" · ");
}

async function answer() {
  if (!model) { await begin(); if (!model) return; }
  const [path, body] = asked();
  const turn = { role: "assistant", content: "" };
  turns.push(turn);
  const element = show(turn);
  fill(element, turn, true);
  toEnd();
  running = new AbortController();
  buttons();
  const began = performance.now();
  let first = 0, tokens = 0, drawn = false;
  const draw = () => {
    drawn = false;
    if (!running) return;
    const follow = atEnd();
    fill(element, turn, true);
    if (follow) toEnd();
  };
  try {
    const response = await fetch(path, {
      method: "POST", signal: running.signal, body: JSON.stringify(body),
      headers: { "Content-Type": "application/json", ...headers() },
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) tokens = event.usage.completion_tokens;
      const choice = event.choices[0];
      const text = choice ? (choice.delta ? choice.delta.content : choice.text) : "";
      if (!text) continue;
      first = first || performance.now();
      turn.content += text;
      if (!drawn) { drawn = true; requestAnimationFrame(draw); }
    }
  } catch (error) {
    if (error.name !== "AbortError") turn.error = error.message;
  }
  running = null;
  sayFacts(turn, began, first, tokens);
  const follow = atEnd();
  fill(element, turn, false);
  if (follow) toEnd();
  store.set("turns", turns.slice(-200));
  buttons();
  prompt.focus();
}

function again() {
  if (running) return;
  while (turns.length && turns[turns.length - 1].role === "assistant") turns.pop();
  redraw();
  if (turns.length) answer();
}

function send(text) {
  if (running || !text.trim()) return;
  turns.push({ role: "user", content: text });
  redraw();
  prompt.value = "";
  grow();
  answer();
}

function grow() { prompt.style.height = "auto"; prompt.style.height = prompt.scrollHeight + "px"; buttons(); }
function buttons() {
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("send").disabled = !prompt.value.trim();
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); send(prompt.value); });
$("stop").addEventListener("click", () => running && running.abort());
$("fresh").addEventListener("click", () => { if (running) running.abort(); turns = []; store.set("turns", turns); redraw(); prompt.focus(); });
$("theme").addEventListener("click", switchTheme);
prompt.addEventListener("input", grow);
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(prompt.value); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && running) running.abort(); });
document.querySelectorAll(".ideas button").forEach((each) => each.addEventListener("click", () => send(each.textContent)));

$("open-settings").addEventListener("click", () => $("settings").showModal());
for (const [id, name, shown] of [["system", "system"], ["temperature", "temperature", 1], ["top-p", "topP", 1], ["most", "most"]]) {
  const field = $(id), say = () => { if (shown) $(id + "-is").textContent = Number(field.value).toFixed(2); };
  field.value = settings[name];
  say();
  field.addEventListener("input", () => {
    const number = Number(field.value);
    if (name === "most" && !(number >= 1)) return;
    settings[name] = name === "system" ? field.value : number;
    store.set("settings", settings);
    say();
  });
}
$("key").value = store.get("key", "");
$("key").addEventListener("change", () => { store.set("key", $("key").value.trim()); begin(); });

redraw();
buttons();
begin();
