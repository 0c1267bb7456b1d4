// Values of a chart under the pointer, in the place of its last value.

function nearest(steps, wanted) {
  let best = 0;
  steps.forEach((step, k) => {
    if (Math.abs(step - wanted) < Math.abs(steps[best] - wanted)) best = k;
  });
  return best;
}

function startChart(chart) {
  const { span: [left, right], steps: [first, last], lines } = JSON.parse(chart.dataset.points);
  const value = chart.closest("figure").querySelector(".value");
  const unread = value.textContent;
  const cursor = h("i", { hidden: true });
  chart.append(cursor);
  const read = (event) => {
    const box = chart.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width - left) / (right - left);
    const wanted = first + share * (last - first);
    const step = lines[0][1][nearest(lines[0][1], wanted)];
    const texts = lines.map(([label, known, values]) => {
      const k = nearest(known, step);
      const other = known[k] === step ? "" : ` (step ${known[k]})`;
      return lines.length > 1 ? `${label} ${values[k]}${other}` : `${values[k]}${other}`;
    });
    value.textContent = `step ${step}: ${texts.join(", ")}`;
    cursor.style.left = `${100 * (left + ((step - first) / (last - first)) * (right - left))}%`;
    cursor.hidden = false;
  };
  chart.addEventListener("pointermove", read);
  chart.addEventListener("pointerdown", read);
  chart.addEventListener("pointerleave", () => {
    value.textContent = unread;
    cursor.hidden = true;
  });
}

function startCharts() {
  document.querySelectorAll("[data-points]").forEach(startChart);
}
