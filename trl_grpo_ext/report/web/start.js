// Draws what the page holds, and the charts again when their width changes.
const DATA = JSON.parse(document.getElementById("data").textContent);

function drawAll() {
  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    const plot = figure.querySelector(".plot");
    if (plot.dataset.width === String(plot.clientWidth)) continue;
    plot.dataset.width = String(plot.clientWidth);
    drawChart(figure, DATA.charts[Number(figure.dataset.chart)]);
  }
}

for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const spec = DATA.charts[Number(figure.dataset.chart)];
  drawLegend(figure, spec, DATA.compares);
  addValues(figure, spec);
}
for (const box of document.querySelectorAll("[data-bars]")) drawBars(box, DATA.bars[Number(box.dataset.bars)].rows);
if (DATA.completions.length) addBrowser(document.getElementById("browser"), DATA.completions);
drawAll();
window.addEventListener("resize", drawAll);
document.documentElement.dataset.drawn = "all";
