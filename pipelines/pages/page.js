// The buttons of the page of a run: accept or reject a case, download the review, look at labels in 3D.
const verdicts = new Map();

for (const row of document.querySelectorAll(".review[data-case]")) {
  const buttons = [...row.querySelectorAll("button[data-verdict]")];
  const comment = row.querySelector("input");
  const keep = (verdict) => {
    verdicts.set(row.dataset.case, { verdict, comment: comment.value });
    buttons.forEach((button) => button.classList.toggle("on", button.dataset.verdict === verdict));
    document.getElementById("reviewed").textContent = [...verdicts.values()].filter((v) => v.verdict).length;
  };
  buttons.forEach((button) => button.addEventListener("click", () => keep(button.dataset.verdict)));
  comment.addEventListener("input", () => keep(verdicts.get(row.dataset.case)?.verdict ?? ""));
  row.querySelector("button[data-view]")?.addEventListener("click", () => look(row));
}

function review() {
  const plain = (text) => text.replace(/[\t\r\n]+/g, " ").replace(/^[=+\-@]/, "'$&");
  const rows = [...verdicts].map(([name, v]) => [name, v.verdict, plain(v.comment)].join("\t"));
  return ["case\tverdict\tcomment", ...rows, ""].join("\n");
}

document.getElementById("save-review")?.addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([review()], { type: "text/tab-separated-values" }));
  link.download = "review.tsv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});

// Draws the labels of a card; resolves to the viewer once the first picture stands.
async function look(row) {
  const stage = row.closest(".card").querySelector(".stage");
  if (stage.firstChild) {
    stage.hidden = !stage.hidden;
    return null;
  }
  stage.hidden = false;
  const canvas = stage.appendChild(document.createElement("canvas"));
  const view = JSON.parse(row.querySelector("script").textContent);
  const viewer = new Niivue({ backColor: [0, 0, 0, 1], show3Dcrosshair: false, isOrientCube: true });
  await viewer.attachToCanvas(canvas, false);
  const bytes = Uint8Array.from(atob(view.volume), (letter) => letter.charCodeAt(0));
  await viewer.loadFromArrayBuffer(bytes.buffer, "labels.nii.gz");
  viewer.volumes[0].setColormapLabel(view.colours);
  viewer.updateGLVolume();
  viewer.setSliceType(viewer.sliceTypeRender);
  viewer.drawScene();
  return viewer;
}

// `report.html#3d-case1` opens the 3D view of the first card.
const asked = location.hash.match(/^#3d-(case\d+)$/) && document.getElementById(location.hash.slice(4));
if (asked?.querySelector("button[data-view]")) {
  asked.scrollIntoView();
  look(asked.querySelector(".review"));
}
