const swipe = document.getElementById("swipe"), after = document.getElementById("after");
const bar = document.getElementById("bar"), change = document.getElementById("change"), stage = document.getElementById("stage");
const show = document.getElementById("show"), opacity = document.getElementById("opacity");
function draw() {
  after.style.clipPath = `inset(0 0 0 ${swipe.value}%)`;
  bar.style.left = `${swipe.value}%`;
  change.style.opacity = show.checked ? opacity.value / 100 : 0;
}
function drag(event) {
  if (event.buttons !== 1) return;
  const box = stage.getBoundingClientRect();
  swipe.value = Math.min(100, Math.max(0, (100 * (event.clientX - box.left)) / box.width));
  draw();
}
for (const control of [swipe, show, opacity]) control.addEventListener("input", draw);
for (const name of ["pointermove", "pointerdown"]) stage.addEventListener(name, drag);
draw();
