// What both pages use: the key, the theme, small helpers.
"use strict";

const store = {
  get(name, otherwise) {
    try { const text = localStorage.getItem("drivetrain." + name); return text === null ? otherwise : JSON.parse(text); }
    catch { return otherwise; }
  },
  set(name, value) { try { localStorage.setItem("drivetrain." + name, JSON.stringify(value)); } catch { /* private windows */ } },
};

function applyTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = store.get("theme", null) || (dark ? "dark" : "light");
}
function switchTheme() {
  store.set("theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  applyTheme();
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", applyTheme);
applyTheme();

function headers() {
  const key = store.get("key", "");
  return key ? { "Authorization": "Bearer " + key } : {};
}

function make(tag, kind, text) {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  if (text !== undefined) element.textContent = text;
  return element;
}
