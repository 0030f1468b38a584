"use strict";
// No library, no build step; nothing is stored: the key and the conversation live as long as the page.

const $ = (id) => document.getElementById(id);
// The service may stand below a path of its own.
const BASE = location.pathname.replace(/\/?$/, "/");
const POLL_MS = 1000;
const MODELS_EVERY = 5;
const HISTORY_MS = 30000;

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

// --- requests ---------------------------------------------------------------------------------------

function headers() {
  const key = $("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function refusal(answer) {
  const text = await answer.text();
  let message = text.slice(0, 400);
  try {
    message = JSON.parse(text).error.message;
  } catch {}
  return new Refused(answer.status, message || `HTTP ${answer.status}`);
}

async function getJson(path) {
  const answer = await fetch(BASE + path, { headers: headers(), cache: "no-store" });
  if (!answer.ok) throw await refusal(answer);
  return answer.json();
}

// The data of server-sent events, one by one, however the bytes are cut. This server ends lines with LF.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const whole = (rest + value).split("\n\n");
    rest = whole.pop();
    for (const event of whole) {
      const data = event.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

