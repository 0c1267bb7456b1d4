// Where completions of one group part: the branching places of the tree of their tokens.

// {depth, members, branches: [{id, members, winners}], entropy, apart} for every place at which at
// least two stored completions share all tokens before it and differ in it.
function forksOf(view) {
  const { token_ids: ids, entropy } = view.step.tokens;
  const { completions } = view.group;
  const lengthOf = (place) => completions[place].stop - completions[place].start;
  const advantage = (place) => completions[place].advantage ?? 0;
  const forks = [];
  // A stack, not a recursion: shared prefixes may be thousands of tokens long.
  const open = [{ depth: 0, members: completions.map((_, place) => place) }];
  while (open.length) {
    const { members } = open[open.length - 1];
    let { depth } = open.pop();
    let branches;
    for (;;) {
      branches = new Map();
      for (const place of members) {
        const id = depth < lengthOf(place) ? ids[completions[place].start + depth] : -1;
        if (!branches.has(id)) branches.set(id, []);
        branches.get(id).push(place);
      }
      if (branches.size !== 1 || branches.has(-1)) break;
      depth += 1;
    }
    if (branches.size > 1) {
      forks.push(describeFork(depth, members, branches, advantage, entropy, completions));
    }
    for (const [id, part] of branches) {
      if (part.length > 1 && id !== -1) open.push({ depth: depth + 1, members: part });
    }
  }
  return forks.sort((a, b) => b.apart - a.apart || a.depth - b.depth);
}

function describeFork(depth, members, branches, advantage, entropy, completions) {
  const parts = [...branches].map(([id, places]) => ({
    id, members: places, winners: places.filter((p) => advantage(p) > 0).length,
    mean: places.reduce((sum, p) => sum + advantage(p), 0) / places.length,
  })).sort((a, b) => b.mean - a.mean);
  const here = members.filter((p) => depth < completions[p].stop - completions[p].start);
  const known = here.map((p) => entropy?.[completions[p].start + depth]).filter((x) => x != null && !Number.isNaN(x));
  const mean = members.reduce((sum, p) => sum + advantage(p), 0) / members.length;
  // How much of the spread of advantages the choice of this token explains.
  const apart = parts.reduce((sum, b) => sum + b.members.length * (b.mean - mean) ** 2, 0);
  return {
    depth, members, branches: parts, apart,
    entropy: known.length ? known.reduce((a, b) => a + b, 0) / known.length : null,
  };
}

function branchText({ id, members, winners }) {
  const piece = id === -1 ? "the end" : `\u201c${shownPiece(id).replace(/[\u200b\n]/g, "")}\u201d`;
  return `${piece}: ${winners} of ${members.length} won`;
}

function forkText(fork) {
  const shown = fork.branches.slice(0, 4).map(branchText);
  if (fork.branches.length > 4) shown.push(`${fork.branches.length - 4} more`);
  return `${plural(fork.members.length, "completion")} part at token ${fork.depth} (${shown.join("; ")}); ` +
    (fork.entropy == null ? "entropy not measured" : `entropy ${short(fork.entropy)}`);
}

// Marks are few on purpose: the forks that tell winners from losers, else the widest.
const MOST_FORKS = 8;

function chosenForks(view) {
  const all = forksOf(view);
  const telling = all.filter((f) => f.apart > 1e-9);
  return { forks: (telling.length ? telling : all).slice(0, MOST_FORKS), count: all.length };
}

function drawForks(view) {
  const items = view.forks.map((fork) => {
    const place = view.order.find((p) => fork.members.includes(p) && view.columns[p].spans.length > fork.depth);
    const button = h("button", { type: "button", class: "link", "data-testid": "fork" }, `\u25c6 ${forkText(fork)}`);
    button.addEventListener("click", () => place != null && moveTo(view, place, fork.depth, true));
    return h("li", {}, button);
  });
  const about = !items.length ? "No two stored completions differ."
    : `${items.length} of ${plural(view.forkCount, "fork")}, those first whose choice decides most about the advantage.`;
  $("xray-forks").replaceChildren(h("p", { class: "soft" }, about), h("ol", {}, ...items));
}

function drawPush(view) {
  const { meta } = view.step;
  const { push, eos_token_id: eos } = meta;
  const box = $("xray-push");
  if (!push) {
    box.replaceChildren(h("p", { class: "soft" }, "Not in this log."));
    return;
  }
  const most = Math.max(1e-300, ...[...push.up, ...push.down].map(([, v]) => Math.abs(v)), Math.abs(push.eos ?? 0));
  const row = ([id, value]) => {
    const bar = h("i", { class: value >= 0 ? "up" : "down" });
    bar.style.width = `${(100 * Math.abs(value)) / most}%`;
    return h("tr", { class: isEos(meta, id) && "eos" },
      h("td", {}, h("code", { class: "piece" }, shownPiece(id)), isEos(meta, id) ? h("small", {}, " EOS") : null),
      h("td", { class: "bar" }, bar), h("td", { class: "n" }, short(value, true)));
  };
  const table = (title, rows, name) => h("table", { "data-testid": `push-${name}` },
    h("caption", {}, title), h("tbody", {}, ...rows.map(row)));
  const shown = (rows, sign) => rows.filter(([, value]) => sign * value > 0);
  const eosText = eos == null ? "The log names no end-of-sequence token."
    : push.eos == null ? "The step did not touch EOS."
      : `EOS is pushed ${push.eos >= 0 ? "up: shorter" : "down: longer"} completions.`;
  box.replaceChildren(
    h("p", { class: "soft", "data-testid": "push-eos" }, `Sum of \u2212d loss / d log p over all tokens of the step, by vocabulary id. ${eosText}`),
    push.eos == null || eos == null ? "" : table("end of sequence", [[eos, push.eos]], "eos-bar"),
    h("div", { class: "pair" }, table("pushed up", shown(push.up, 1), "up"), table("pushed down", shown(push.down, -1), "down")),
  );
}
