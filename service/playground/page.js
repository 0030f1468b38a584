// The playground, and what a person does with the page.

// --- state of the service ---------------------------------------------------------------------------

function setStatus(state, text) {
  $("status").className = state;
  if ($("status-text").textContent !== text) $("status-text").textContent = text;
}

let card = null;

async function loadModels() {
  try {
    const cards = (await getJson("v1/models")).data;
    card = cards[0];
    const names = cards.map((each) => each.id);
    if (names.join() !== [...$("model").options].map((option) => option.value).join()) {
      $("model").replaceChildren(...names.map((name) => new Option(name, name)));
    }
    setStatus("ok", `ready, up to ${card.max_model_len.toLocaleString("en")} tokens`);
    drawPlan(card.index_plan || "");
  } catch (error) {
    if (error instanceof Refused && error.status === 401) setStatus("down", "an API key is needed");
    else if (error instanceof Refused) setStatus("down", error.message.slice(0, 80));
    else setStatus("down", "the service does not answer");
  }
}

function drawPlan(plan) {
  if ($("plan").dataset.plan === plan) return;
  $("plan").dataset.plan = plan;
  $("plan").replaceChildren(
    ...[...plan].map((letter, layer) => {
      const badge = make("b", `role ${letter}`, letter);
      badge.title = `layer ${layer}`;
      return badge;
    }),
  );
}

// --- playground -------------------------------------------------------------------------------------

let isChat = false;
let running = null;
const conversation = [];

function selectTab(chat, focus) {
  if (running) return;
  isChat = chat;
  for (const [name, selected] of [["completion", !chat], ["chat", chat]]) {
    const tab = $(`tab-${name}`);
    tab.setAttribute("aria-selected", String(selected));
    tab.tabIndex = selected ? 0 : -1;
    $(`panel-${name}`).hidden = !selected;
    if (selected && focus) tab.focus();
  }
  $("result").hidden = chat;
  $("run").textContent = chat ? "Send" : "Run";
  showError(null);
}

function showError(message) {
  $("error").hidden = message === null;
  $("error").textContent = message || "";
}

// What the fields say. Raises Error with words for the person who filled them in.
function settings() {
  const fields = { model: $("model").value, stream: true, stream_options: { include_usage: true } };
  for (const [id, name, isInteger] of [["temperature", "temperature", false], ["max-tokens", "max_tokens", true], ["seed", "seed", true]]) {
    const input = $(id);
    if (!input.validity.valid) throw new Error(`${name}: ${input.validationMessage}`);
    if (input.value === "") continue;
    fields[name] = Number(input.value);
    if (isInteger && !Number.isSafeInteger(fields[name])) throw new Error(`${name} must be a whole number below 2^53`);
  }
  const stops = $("stop").value.split(",").map((stop) => stop.replaceAll("\\n", "\n")).filter((stop) => stop !== "");
  if (stops.length) fields.stop = stops;
  return fields;
}

function body() {
  const fields = settings();
  if (!isChat) return ["v1/completions", { ...fields, prompt: $("prompt").value }];
  return ["v1/chat/completions", { ...fields, messages: conversation.map(({ role, content }) => ({ role, content })) }];
}

// Where the text of an answer goes, as it comes.
function outputPane() {
  const given = make("span", "given", $("prompt").value);
  const text = make("span");
  $("output").replaceChildren(given, text);
  return {
    add(choice) {
      const pane = $("output");
      const isAtEnd = pane.scrollTop + pane.clientHeight >= pane.scrollHeight - 30;
      text.append(choice.text || "");
      if (isAtEnd) pane.scrollTop = pane.scrollHeight;
    },
  };
}

function drawMessage(message) {
  const item = make("li", message.role);
  const text = make("div", "text", message.content);
  item.append(make("b", "", message.role === "user" ? "You" : "Model"), text);
  $("messages").append(item);
  item.scrollIntoView({ block: "nearest" });
  let thought = null;
  return (delta) => {
    const reasoning = delta.reasoning_content || "";
    if (reasoning) {
      if (!thought) {
        const details = make("details");
        thought = make("span");
        details.append(make("summary", "", "Thinking"), thought);
        item.insertBefore(details, text);
      }
      thought.append(reasoning);
    }
    for (const call of delta.tool_calls || []) text.append(call.function?.name || "", call.function?.arguments || "");
    message.content += delta.content || "";
    text.append(delta.content || "");
    $("messages").scrollTop = $("messages").scrollHeight;
  };
}

function chatPane() {
  const message = { role: "assistant", content: "" };
  const grow = drawMessage(message);
  conversation.push(message);
  return { add: (choice) => grow(choice.delta || {}) };
}

function showNumbers(seen) {
  const ms = (value) => (value < 1000 ? `${value.toFixed(0)} ms` : `${(value / 1000).toFixed(2)} s`);
  const usage = seen.usage || {};
  const number = (value) => (value === undefined || value === null ? "–" : value.toLocaleString("en"));
  $("n-ttft").textContent = seen.first === null ? "–" : ms(seen.first - seen.start);
  const tokens = usage.completion_tokens ?? seen.pieces;
  const seconds = (seen.last - seen.first) / 1000;
  $("n-rate").textContent = tokens > 1 && seconds > 0 ? ((tokens - 1) / seconds).toFixed(1) : "–";
  $("n-prompt").textContent = number(usage.prompt_tokens);
  $("n-cached").textContent = number(usage.prompt_tokens_details?.cached_tokens);
  $("n-output").textContent = number(tokens);
  $("n-reason").textContent = seen.reason || "–";
}

async function generate() {
  if (running) return;
  showError(null);
  let pane = null;
  const sent = isChat ? $("message").value : "";
  const seen = { start: 0, first: null, last: 0, pieces: 0, usage: null, reason: null };
  const controller = new AbortController();
  running = controller;
  try {
    if (isChat) {
      if (!sent.trim()) throw new Error("There is no message to send.");
      settings();
      const message = { role: "user", content: sent };
      conversation.push(message);
      drawMessage(message);
      $("message").value = "";
    }
    const [path, fields] = body();
    setRunning(true);
    showNumbers(seen);
    seen.start = performance.now();
    const answer = await fetch(BASE + path, {
      method: "POST",
      headers: { ...headers(), "Content-Type": "application/json" },
      body: JSON.stringify(fields),
      signal: controller.signal,
    });
    if (!answer.ok) throw await refusal(answer);
    pane = isChat ? chatPane() : outputPane();
    for await (const event of events(answer)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) seen.usage = event.usage;
      const choice = event.choices?.[0];
      if (!choice) continue;
      if (choice.finish_reason) seen.reason = choice.finish_reason;
      const delta = choice.delta || {};
      if (choice.text || delta.content || delta.reasoning_content || delta.tool_calls) {
        seen.last = performance.now();
        seen.first ??= seen.last;
        seen.pieces += 1;
      }
      pane.add(choice);
      showNumbers(seen);
    }
    if (!seen.reason) throw new Error("The stream broke off before its end.");
  } catch (error) {
    if (error.name === "AbortError") seen.reason = "you";
    else showError(error instanceof TypeError ? "The service does not answer." : error.message);
    if (isChat && !pane && conversation.at(-1)?.role === "user") {
      // Nothing was answered: the words go back to where they can be changed.
      $("message").value = conversation.pop().content;
      $("messages").lastElementChild.remove();
    }
  } finally {
    showNumbers(seen);
    running = null;
    setRunning(false);
  }
}

function setRunning(on) {
  $("play").classList.toggle("running", on);
  $("run").disabled = on;
  $("cancel").disabled = !on;
  $("play").setAttribute("aria-busy", String(on));
}

function clear() {
  running?.abort();
  conversation.length = 0;
  $("messages").replaceChildren();
  $("output").replaceChildren();
  showError(null);
  showNumbers({ start: 0, first: null, last: 0, pieces: null, usage: null, reason: null });
}

// --- events -----------------------------------------------------------------------------------------

$("form").noValidate = true;
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
$("cancel").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", clear);
for (const chat of [false, true]) {
  const tab = $(chat ? "tab-chat" : "tab-completion");
  tab.addEventListener("click", () => selectTab(chat, false));
  tab.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") selectTab(!chat, true);
  });
}
for (const input of document.querySelectorAll("input[type=radio]")) input.addEventListener("change", drawLayers);
$("key").addEventListener("change", () => poll());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    generate();
  }
});

async function poll() {
  await Promise.all([loadModels(), loadLayers()]);
}

// A page that nobody sees asks for nothing. The model hardly ever changes.
let turn = 0;
async function keepPolling() {
  if (!document.hidden) {
    const isDue = turn++ % MODELS_EVERY === 0 || $("status").className !== "ok";
    await (isDue ? poll() : loadLayers());
  }
  setTimeout(keepPolling, POLL_MS);
}

keepPolling();
