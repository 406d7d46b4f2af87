// Markdown as elements. Text only ever becomes text nodes, so nothing that a model writes is markup.
"use strict";

const INLINE = /(`+)([\s\S]*?[^`])\1(?!`)|\*\*([\s\S]+?)\*\*|__([^_]+)__|~~([\s\S]+?)~~|\*([^*\s][^*]*)\*|\b_([^_\s][^_]*)_\b|\[([^\]]+)\]\(([^\s()]+(?:\([^\s()]*\))?)\)|(https?:\/\/[^\s<>()]+[^\s<>().,;:!?'"])/;

function link(text, target) {
  let address = null;
  try { address = new URL(target); } catch { /* relative ones lead nowhere */ }
  if (!address || !["http:", "https:", "mailto:"].includes(address.protocol)) return make("span", "", text);
  const element = make("a", "", text);
  element.href = address.href;
  element.target = "_blank";
  element.rel = "noopener noreferrer nofollow";
  return element;
}

function inline(parent, text, depth = 0) {
  while (text) {
    const found = depth < 8 ? INLINE.exec(text) : null;
    if (!found) { parent.append(text); return; }
    parent.append(text.slice(0, found.index));
    text = text.slice(found.index + found[0].length);
    const [, ticks, code, bold, bold2, struck, slanted, slanted2, label, target, bare] = found;
    if (ticks) parent.append(make("code", "", code.trim()));
    else if (label) parent.append(link(label, target));
    else if (bare) parent.append(link(bare, bare));
    else {
      const tag = bold || bold2 ? "strong" : struck ? "del" : "em";
      const element = make(tag);
      inline(element, bold || bold2 || struck || slanted || slanted2, depth + 1);
      parent.append(element);
    }
  }
}

function codeBlock(language, lines) {
  const block = make("div", "block"), head = make("header"), copy = make("button", "plain", "Copy");
  const text = lines.join("\n");
  copy.type = "button";
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    copy.textContent = "Copied";
    setTimeout(() => { copy.textContent = "Copy"; }, 1500);
  });
  head.append(make("span", "", language || "text"), copy);
  const pre = make("pre");
  pre.append(make("code", "", text));
  block.append(head, pre);
  return block;
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split("|").map((each) => each.trim());
}

function table(lines) {
  const wide = make("div", "wide"), element = make("table");
  lines.forEach((line, number) => {
    if (number === 1) return;
    const row = make("tr");
    for (const each of cells(line)) {
      const cell = make(number ? "td" : "th");
      inline(cell, each);
      row.append(cell);
    }
    element.append(row);
  });
  wide.append(element);
  return wide;
}

const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;

function list(lines, depth = 0) {
  const first = ITEM.exec(lines[0]);
  const element = make(/\d/.test(first[2]) ? "ol" : "ul");
  if (element.tagName === "OL") element.start = parseInt(first[2], 10);
  const indent = first[1].length;
  for (let at = 0; at < lines.length;) {
    const found = ITEM.exec(lines[at]);
    const item = make("li");
    inline(item, found ? found[3] : lines[at].trim());
    const inner = [];
    for (at++; at < lines.length; at++) {
      const next = ITEM.exec(lines[at]);
      if (next && next[1].length <= indent) break;
      inner.push(lines[at]);
    }
    const start = inner.findIndex((line) => ITEM.test(line));
    const text = (start < 0 ? inner : inner.slice(0, start)).map((line) => line.trim()).filter(Boolean).join(" ");
    if (text) { item.append(" "); inline(item, text); }
    if (start >= 0 && depth < 12) item.append(list(inner.slice(start), depth + 1));
    element.append(item);
  }
  return element;
}

function markdown(text, depth = 0) {
  const whole = document.createDocumentFragment();
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const until = (at, stop) => { let end = at; while (end < lines.length && !stop(lines[end], end)) end++; return end; };
  const begins = (line, at) => !line.trim() || /^\s*(```|~~~|#{1,6}\s|>)/.test(line) || (ITEM.test(line) && at !== undefined) || /^\s*([-*_])(\s*\1){2,}\s*$/.test(line);
  for (let at = 0; at < lines.length;) {
    const line = lines[at];
    const fence = /^\s*(```+|~~~+)\s*([\w+#.-]*)/.exec(line), title = /^(#{1,6})\s+(.*?)\s*#*$/.exec(line);
    if (!line.trim()) { at++; continue; }
    if (fence) {
      const end = until(at + 1, (each) => each.trim().startsWith(fence[1]) && !each.trim().slice(fence[1].length).trim());
      whole.append(codeBlock(fence[2], lines.slice(at + 1, end)));
      at = end + 1;
    } else if (title) {
      const element = make("h" + Math.min(4, title[1].length));
      inline(element, title[2]);
      whole.append(element);
      at++;
    } else if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) {
      whole.append(make("hr"));
      at++;
    } else if (/^\s*>/.test(line)) {
      const end = until(at, (each) => !/^\s*>/.test(each));
      const element = make("blockquote"), inner = lines.slice(at, end).map((each) => each.replace(/^\s*>\s?/, "")).join("\n");
      element.append(depth < 8 ? markdown(inner, depth + 1) : inner);
      whole.append(element);
      at = end;
    } else if (ITEM.test(line)) {
      const end = until(at, (each, place) => !each.trim() && !(lines[place + 1] && (ITEM.test(lines[place + 1]) || /^\s{2,}\S/.test(lines[place + 1]))));
      whole.append(list(lines.slice(at, end).filter((each) => each.trim())));
      at = end;
    } else if (line.includes("|") && /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/.test(lines[at + 1] || "")) {
      const end = until(at, (each) => !each.includes("|"));
      whole.append(table(lines.slice(at, end)));
      at = end;
    } else {
      const end = Math.max(at + 1, until(at + 1, begins));
      const element = make("p");
      lines.slice(at, end).forEach((each, number) => {
        if (number) element.append(/\s{2}$/.test(lines[at + number - 1]) ? make("br") : "\n");
        inline(element, each.trimEnd());
      });
      whole.append(element);
      at = end;
    }
  }
  return whole;
}
