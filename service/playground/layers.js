// What the index cache did, by layer.

const snapshots = [];

const chosen = (name) => document.querySelector(`input[name=${name}]:checked`).value;

// Counters since the chosen time, by layer. What shrank belongs to a service that was started anew.
function since(now) {
  if (chosen("span") === "all") return now.layers;
  const old = snapshots[0]?.layers || [];
  return now.layers.map((layer, i) => {
    const before = old[i];
    if (!before || before.computed > layer.computed || before.reused > layer.reused) return layer;
    const difference = { ...layer };
    for (const [name, value] of Object.entries(layer)) {
      if (name === "layer" || name === "source") continue;
      if (typeof value === "number") difference[name] = value - before[name];
      else if (value && typeof value === "object") {
        difference[name] = Object.fromEntries(Object.entries(value).map(([phase, sum]) => [phase, sum - (before[name][phase] || 0)]));
      }
    }
    return difference;
  });
}

const mean = (sum, count) => (count > 0 ? sum / count : null);
const micro = (seconds) => {
  if (seconds === null) return "–";
  const us = seconds * 1e6;
  return us < 1000 ? `${us.toFixed(us < 10 ? 1 : 0)} µs` : `${(us / 1000).toFixed(2)} ms`;
};
const percent = (share, digits = 0) => (share === null ? "–" : `${(share * 100).toFixed(digits)} %`);

function meter(value, largest, className) {
  const cell = make("td");
  if (value === null) {
    cell.append(make("span", "off", "–"));
    return cell;
  }
  const box = make("div", `meter ${className}`);
  const bar = make("i");
  bar.style.width = `${Math.max(1, (value / largest) * 100)}%`;
  box.append(bar, make("span", "", micro(value)));
  cell.append(box);
  return cell;
}

function drawLayers() {
  const now = snapshots.at(-1);
  if (!now) return;
  const phase = chosen("phase");
  const rows = since(now).map((layer) => ({
    ...layer,
    indexer: mean(layer.indexer_s[phase] || 0, layer.indexer_samples[phase] || 0),
    attention: mean(layer.attention_s[phase] || 0, layer.attention_samples[phase] || 0),
    skipped: mean(layer.reused, layer.computed + layer.reused),
    overlap: mean(layer.overlap_sum, layer.overlap_count),
  }));
  const largest = Math.max(1e-9, ...rows.flatMap((row) => [row.indexer || 0, row.attention || 0]));
  const letters = { dense: "D", compute: "F", reuse: "S" };
  $("layers").replaceChildren(
    ...rows.map((row) => {
      const line = make("tr");
      const cell = make("td");
      const name = make("div", "layer");
      const letter = letters[row.role] || "?";
      name.append(make("b", `role ${letter}`, letter), make("span", "", String(row.layer)));
      if (row.role === "reuse") name.append(make("span", "from", `from ${row.source}`));
      cell.append(name);
      const skipped = make("td", "", row.role === "dense" ? "" : percent(row.skipped));
      const overlap = make("td", "", row.role === "reuse" ? percent(row.overlap, 1) : "");
      line.append(cell, meter(row.indexer, largest, "select"), meter(row.attention, largest, ""), skipped, overlap);
      return line;
    }),
  );
  drawSummary(now, rows);
}

function drawSummary(now, rows) {
  const total = (name) => rows.reduce((sum, row) => sum + (row[name] || 0), 0);
  const share = mean(total("reused"), total("computed") + total("reused"));
  const indexer = total("indexer");
  const part = mean(indexer, indexer + total("attention"));
  const parts = [
    ["", percent(share, 1)],
    [" of selections reused. Indexer: ", indexer > 0 ? micro(indexer) : "–"],
    [" a step, ", percent(part)],
    [" of the time of indexer and sparse attention.", ""],
  ];
  const nodes = parts.flatMap(([text, value]) => (value ? [text, make("b", "", value)] : [text]));
  if (now.engines !== 1) nodes.push(` ${now.engines} engine replicas.`);
  if (now.guard_active > 0) nodes.push(" ", make("b", "", "The audit's guard is active: every layer selects."));
  $("summary").replaceChildren(...nodes);
}

async function loadLayers() {
  try {
    const layers = await getJson("playground/layers");
    const at = performance.now();
    while (snapshots.length > 1 && at - snapshots[1].at >= HISTORY_MS) snapshots.shift();
    // A service that was started anew counts from 0 again.
    if (snapshots.length && snapshots.at(-1).layers.length !== layers.layers.length) snapshots.length = 0;
    snapshots.push({ at, ...layers });
    drawLayers();
  } catch (error) {
    snapshots.length = 0;
    $("layers").replaceChildren();
    $("summary").textContent = error instanceof Refused ? error.message : "The service does not answer.";
  }
}

