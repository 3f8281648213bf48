// The layout nearest to the hand, told beside it.
const picture = document.getElementById("pareto"), tip = document.getElementById("tip");
picture?.addEventListener("pointermove", (event) => {
  const box = picture.getBoundingClientRect(), scale = picture.viewBox.baseVal.width / box.width;
  const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
  let near = null, least = 150;
  for (const point of points) {
    const away = (point[0] - x) ** 2 + (point[1] - y) ** 2;
    if (away < least) { least = away; near = point; }
  }
  tip.style.display = near ? "block" : "none";
  if (!near) return;
  tip.textContent = near[2];
  tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 4)) + "px";
  tip.style.top = event.clientY + 16 + "px";
});
picture?.addEventListener("pointerleave", () => { tip.style.display = "none"; });
