// The search box. Names come from index.js, which is loaded when the box is first used: as a script, since a page that
// was opened from a folder may not fetch. "/" goes to the box, arrows choose, Enter opens, Escape leaves.
(() => {
  const root = document.currentScript.dataset.root
  const box = document.querySelector(".search input"), list = document.querySelector(".search ol")
  let chosen = 0

  function load() {
    if (document.getElementById("index")) return
    const script = document.createElement("script")
    script.id = "index"
    script.src = root + "index.js"
    script.onload = show
    document.head.append(script)
  }

  // The smaller, the better; Infinity where it does not match
  function rank([name, kind, , about], word) {
    const low = name.toLowerCase(), last = low.split(/[./]/).pop()
    const base = { file: 0.3, class: 0, function: 0.1, guide: 0.4, method: 0.2, field: 0.5, constant: 0.6 }[kind]
    if (low === word || last === word || last === word + "py") return base
    if (low.replace(/\.py$/, "").endsWith("/" + word)) return base + 0.5
    if (low.startsWith(word)) return 1 + base + low.length / 1000
    if (last.startsWith(word)) return 2 + base + low.length / 1000
    if (low.includes(word)) return 3 + base + low.length / 1000
    return about.toLowerCase().includes(word) ? 5 + base : Infinity
  }

  function show() {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean)
    list.replaceChildren()
    if (!words.length || !window.INDEX) { list.hidden = true; return }
    const found = window.INDEX.map(entry => [words.reduce((sum, word) => sum + rank(entry, word), 0), entry])
      .filter(([score]) => score < Infinity).sort((a, b) => a[0] - b[0]).slice(0, 12)
    for (const [, [name, kind, address, about]] of found) {
      const link = document.createElement("a"), item = document.createElement("li")
      link.href = root + address
      for (const [tag, text] of [["b", name], ["small", kind === "file" ? "" : address.split(".html")[0]], ["span", about]]) {
        const part = document.createElement(tag)
        part.textContent = text
        link.append(part)
      }
      item.append(link)
      list.append(item)
    }
    if (!found.length) list.append(Object.assign(document.createElement("li"), { textContent: "Nothing of that name." }))
    chosen = 0
    mark()
    list.hidden = false
  }

  function mark() {
    [...list.children].forEach((item, i) => item.classList.toggle("chosen", i === chosen))
    list.children[chosen]?.scrollIntoView({ block: "nearest" })
  }

  box.addEventListener("focus", load)
  box.addEventListener("input", show)
  box.addEventListener("keydown", event => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key]
    if (step) {
      chosen = Math.max(0, Math.min(list.children.length - 1, chosen + step))
      mark()
      event.preventDefault()
    } else if (event.key === "Enter") {
      list.children[chosen]?.querySelector("a")?.click()
    } else if (event.key === "Escape") {
      list.hidden = true
      box.blur()
    }
  })
  document.addEventListener("keydown", event => {
    if (event.key === "/" && !/input|textarea/i.test(event.target.tagName)) { box.focus(); event.preventDefault() }
  })
  document.addEventListener("click", event => { if (!event.target.closest(".search")) list.hidden = true })
})()
