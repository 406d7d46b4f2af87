// The engine, once a second.
"use strict";

const $ = (id) => document.getElementById(id);
const LENGTH = 180;
const history = { speed: [], queue: [] };

function svg(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function draw(id, values) {
  const most = Math.max(1, ...values) * 1.15, picture = $(id);
  const points = values.map((value, at) => `${LENGTH - values.length + at + 1},${(100 - (value / most) * 100).toFixed(2)}`);
  picture.replaceChildren();
  for (const y of [25, 50, 75, 99.5]) picture.append(svg("line", { class: "grid", x1: 0, x2: LENGTH, y1: y, y2: y }));
  if (points.length < 2) return;
  const start = LENGTH - values.length + 1;
  picture.append(svg("polygon", { class: "area", points: `${start},100 ${points.join(" ")} ${LENGTH},100` }));
  picture.append(svg("polyline", { class: "stroke", points: points.join(" ") }));
}

function note(name, value) {
  history[name].push(value);
  if (history[name].length > LENGTH) history[name].shift();
}

function row(worker) {
  const element = make("tr"), state = make("td"), chip = make("span", "chip"), cache = make("td"), meter = make("div", "meter"), bar = make("i");
  chip.append(make("span", "dot " + (worker.ready ? "ok" : "bad")), make("span", "", worker.ready ? "serves" : "starting"));
  state.append(chip);
  bar.style.width = 100 * (worker.cache_used || 0) + "%";
  meter.append(bar);
  cache.append(meter);
  element.append(
    make("td", "", worker.worker), state, make("td", "", worker.running ?? 0), make("td", "", worker.waiting ?? 0), cache,
    make("td", "wide-only", (worker.cache_tokens ?? 0).toLocaleString()), make("td", "wide-only", worker.preemptions ?? 0), make("td", "", worker.restarts),
  );
  return element;
}

async function look() {
  try {
    const answer = await fetch("/live/status", { headers: headers() });
    if (answer.status === 401) throw new Error("needs the API key: set it in the chat's settings");
    const now = await answer.json(), workers = now.workers, ready = workers.filter((each) => each.ready).length;
    $("model").textContent = now.model;
    document.title = now.model + " · engine";
    $("state").className = "dot " + (ready === workers.length ? "ok" : "bad");
    $("said").textContent = ready === workers.length ? "serving" : `${ready} of ${workers.length} workers serve`;
    $("speed").textContent = now.tokens_per_second.toFixed(now.tokens_per_second < 10 ? 1 : 0);
    $("first").textContent = now.first_token_seconds === null ? "–" : now.first_token_seconds.toFixed(2);
    $("open").textContent = now.open;
    $("most").textContent = "of " + now.most_open;
    $("open-meter").style.width = Math.min(100, (100 * now.open) / now.most_open) + "%";
    const used = workers.reduce((sum, each) => sum + (each.cache_used || 0), 0) / workers.length;
    $("cache").textContent = (100 * used).toFixed(0);
    $("cache-meter").style.width = 100 * used + "%";
    note("speed", now.tokens_per_second);
    note("queue", workers.reduce((sum, each) => sum + (each.running || 0) + (each.waiting || 0), 0));
    draw("speed-line", history.speed);
    draw("queue-line", history.queue);
    $("workers").replaceChildren(...workers.map(row));
    $("total").textContent = `${now.tokens.toLocaleString()} tokens since the start, ${Math.round(now.seconds / 60)} min ago · context ${now.capacity} tokens`;
  } catch (error) {
    $("state").className = "dot bad";
    $("said").textContent = error instanceof TypeError ? "not reached" : error.message;
  }
  setTimeout(look, 1000);
}

$("theme").addEventListener("click", switchTheme);
look();
