// "Copy as regression test": the shown group as one file that pytest runs on the eager reference.

// Of the config what is about the whole step, or about logits that no log has.
const NOT_EXPORTED = ["objective", "temperature", "top_entropy_quantile", "use_adaptive_entropy"];

function notExportedBecause(view) {
  const { result, config } = view.trained;
  if (result.reason) return result.reason;
  if (config.top_entropy_quantile < 1) return "top_entropy_quantile is a quantile over all tokens of the step";
  return view.sequences.some(({ live }) => live.length) ? null : "nothing of this group was forwarded";
}

// The fewest digits that are the same float32.
function digits(x) {
  if (Number.isNaN(x)) return null;
  for (let count = 6; count < 9; count++) {
    const short = Number(x.toPrecision(count));
    if (Math.fround(short) === x) return short;
  }
  return Number(x.toPrecision(9));
}

// What a completion's loss was divided by, beside its own or its group's tokens.
function denominatorOf(view) {
  const { config, result } = view.trained;
  const place = view.sequences.findIndex(({ live }) => live.length);
  const all = view.sequences.reduce((sum, { live }) => sum + live.length, 0);
  const own = { sequence_mean: view.sequences[place].live.length, prompt_mean: all }[addsUp(config)] ?? 1;
  return 1 / (result.terms[place].weight * own);
}

function exportedCompletion(view, place) {
  const { start, stop, index, advantage } = view.group.completions[place];
  const { tokens } = view.step;
  const live = new Set(view.sequences[place].live);
  const row = (values, write) => Array.from(values.subarray(start, stop), (x, t) => (live.has(t) ? write(x) : null));
  const columns = ["logprobs", "old_logprobs", "ref_logprobs", "sampler_logprobs", "ratio", "kl"];
  return {
    index, advantage: advantage ?? 0,
    token_ids: Array.from(tokens.token_ids.subarray(start, stop)),
    mask: Array.from({ length: stop - start }, (_, t) => Number(live.has(t))),
    ...Object.fromEntries(columns.filter((name) => tokens[name]).map((name) => [name, row(tokens[name], digits)])),
    slope: Array.from(view.trained.result.terms[place].slope),
  };
}

function exportedGroup(view) {
  const { meta } = view.step;
  const { group, rule } = view;
  const kept = ([name]) => !NOT_EXPORTED.includes(name) && !name.startsWith("entropy_");
  return {
    step: meta.step, group: group.index, row: group.row ?? null, prompt: group.prompt,
    config: Object.fromEntries(Object.entries(meta.loss).filter(kept)),
    denominator: denominatorOf(view), loss: view.trained.result.loss,
    rewards: group.rewards,
    // Where the stored advantages are not made of the stored rewards, there is no such test.
    advantage: rule.reason == null ? [{ scale: rule.scale, baseline: rule.baseline }] : [],
    completions: group.completions.map((_, place) => place)
      .filter((place) => view.sequences[place].lp.length).map((place) => exportedCompletion(view, place)),
  };
}

// ASCII, and nothing that ends the Python string it stands in.
function fixtureOf(view) {
  const json = JSON.stringify(exportedGroup(view)).replace(/['\u007f-\uffff]/g,
    (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
  return island.group_test.replace("GROUP_AS_JSON", () => json.replaceAll(/(,"(?:completions|index)":)/g, "\n$1"));
}

async function copyFixture(view, said) {
  const text = fixtureOf(view);
  const size = `${Math.ceil(text.length / 1000)} kB`;
  try {
    await navigator.clipboard.writeText(text);
    said.textContent = `Copied, ${size}: put it into a file test_\u2026.py, and pytest runs it.`;
  } catch {
    said.textContent = "This browser does not let a page copy: download it instead.";
  }
}

function saveFixture(view, said) {
  const url = URL.createObjectURL(new Blob([fixtureOf(view)], { type: "text/x-python" }));
  const name = `test_step_${view.step.meta.step}_group_${view.group.index}`.replace(/\W/g, "_");
  h("a", { href: url, download: `${name}.py` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
  said.textContent = `Saved as ${name}.py.`;
}

function drawFixture(view) {
  const reason = notExportedBecause(view);
  const said = h("small", { class: "soft", role: "status", "data-testid": "fixture-said" }, reason ? `No test of it: ${reason}.` : "");
  const button = (name, text, act) => {
    const made = h("button", { type: "button", "data-testid": name, disabled: reason != null }, text);
    made.addEventListener("click", () => act(view, said));
    return made;
  };
  $("xray-fixture").replaceChildren(
    button("fixture-copy", "Copy as regression test", copyFixture),
    button("fixture-save", "Download it", saveFixture), said);
}
