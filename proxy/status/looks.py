"""How the status page looks and refreshes itself: its style, its script, and the policy that allows only these.

Without the script the whole page is loaded anew. With it, what differs is put in place, so that scrolling, selection
and what is being typed stay; a page that gets no answer says since when.
"""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256

#: Seconds.
REFRESH = 5

STYLE = """
:root{color-scheme:light dark;--back:light-dark(#fff,#121212);--text:light-dark(#1b1b1b,#e8e8e8);
  --soft:light-dark(#555,#b0b0b0);--line:light-dark(#d4d4d4,#3c3c3c);--edge:light-dark(#767676,#8a8a8a)}
*{box-sizing:border-box}
body{font:14px/1.45 system-ui,sans-serif;margin:0 auto;max-width:110rem;padding:1rem;
  background:var(--back);color:var(--text)}
a{color:light-dark(#0b57d0,#8ab4f8)}
h1{font-size:1.35rem;margin:0;overflow-wrap:anywhere}h2{font-size:1.05rem;margin:1.6rem 0 .3rem}
p{margin:.2rem 0}.f{overflow-wrap:anywhere}.f,caption,dt,thead th,tr.i>*,th span{color:var(--soft)}
form{margin:.6rem 0;display:flex;flex-wrap:wrap;gap:.4rem;align-items:center}
input,button{font:inherit;color:inherit;background:var(--back);border:1px solid var(--edge);border-radius:4px;
  padding:.25rem .5rem}
input{flex:0 1 16rem;width:8rem;min-width:0}
.s{overflow-x:auto}table{border-collapse:collapse}caption{text-align:left;white-space:nowrap;padding:0 0 .2rem}
th,td{padding:.22rem .6rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:400}thead th{font-weight:600}th span{font-size:.85em}
.l{display:block;width:max-content;max-width:34rem;white-space:normal;overflow-wrap:anywhere}
.n{text-align:right;font-variant-numeric:tabular-nums}
tbody th,thead th:first-child{position:sticky;left:0;background:var(--back);padding-left:0}
tr.i>*{border-bottom-style:dotted}tr.i th{padding-left:1rem}
.w{color:light-dark(#8a3b00,#f5a524);font-weight:600}.b{color:light-dark(#b3121b,#ff8a82);font-weight:600}
.ok{color:light-dark(#116329,#56d364)}ul{margin:.3rem 0;padding-left:1.2rem;overflow-wrap:anywhere}
dl{display:flex;flex-wrap:wrap;gap:.3rem 1.6rem;margin:.6rem 0}dl div{display:flex;gap:.4rem}
dd{margin:0;font-weight:600;font-variant-numeric:tabular-nums}
.h{display:flex;flex-wrap:wrap;gap:.6rem 2rem}figure{margin:0;width:20rem;max-width:100%}figcaption{color:var(--soft)}
svg{display:block;width:100%;border-bottom:1px solid var(--line)}
polyline{fill:none;stroke:light-dark(#0b57d0,#8ab4f8);stroke-width:1.5}
@media(max-width:40rem){body{padding:.7rem}th,td{padding:.22rem .4rem}caption{white-space:normal}
  tbody th{min-width:8.6rem;max-width:9rem;white-space:normal;overflow-wrap:anywhere}
  caption{max-width:calc(100vw - 1.4rem)}.l{max-width:18rem}}
"""

# `same` makes the old tree like the new one and keeps each node that it can. Rows are told apart by their heads, since
# they change places; an inner row by that of the row above it, too.
SCRIPT = """
(()=>{
const every=SECONDS*1000,live=document.getElementById('live');let timer=0,at=Date.now();
const keys=rows=>{let above='';return rows.map(row=>{const own=row.cells[0].textContent;
  if(row.className!=='i'){above=own;return own}return above+'\\n'+own})};
const same=(old,now)=>{
  if(old.nodeType!==now.nodeType||old.nodeName!==now.nodeName){old.replaceWith(now.cloneNode(true));return}
  if(old.nodeType===3){if(old.data!==now.data)old.data=now.data;return}
  if(old===live)return;
  for(const{name}of[...old.attributes])if(!now.hasAttribute(name))old.removeAttribute(name);
  for(const{name,value}of now.attributes)if(old.getAttribute(name)!==value)old.setAttribute(name,value);
  if(old.nodeName==='TBODY')inOrder(old,now);
  const was=[...old.childNodes],is=[...now.childNodes];
  is.forEach((node,index)=>index<was.length?same(was[index],node):old.append(node.cloneNode(true)));
  was.slice(is.length).forEach(node=>node.remove())};
const inOrder=(old,now)=>{
  const had=new Map(),rows=[...old.rows];keys(rows).forEach((key,index)=>had.set(key,rows[index]));
  const wanted=[...now.rows];keys(wanted).forEach((key,index)=>{
    const row=had.get(key)||wanted[index].cloneNode(true),there=old.rows[index];had.delete(key);
    if(there!==row)old.insertBefore(row,there||null)});
  had.forEach(row=>row.remove())};
const put=page=>{
  const s=getSelection(),[a,i,b,j]=[s.anchorNode,s.anchorOffset,s.focusNode,s.focusOffset];
  same(document.querySelector('main'),page.querySelector('main'));document.title=page.title;
  const most=node=>node.nodeType===3?node.data.length:node.childNodes.length;
  if(a&&b&&a.isConnected&&b.isConnected&&(a!==b||i!==j))s.setBaseAndExtent(a,Math.min(i,most(a)),b,Math.min(j,most(b)))};
const next=()=>{clearTimeout(timer);timer=setTimeout(look,every)};
const look=async()=>{
  if(document.hidden)return next();
  try{const answer=await fetch(location.href,{cache:'no-store',signal:AbortSignal.timeout(3*every)});
    if(!answer.ok)throw Error(answer.status);
    put(new DOMParser().parseFromString(await answer.text(),'text/html'));at=Date.now();
    if(live.textContent)live.textContent=''}
  catch(error){live.textContent='No answer for '+Math.round((Date.now()-at)/1000)+' s. What is shown is old.'}
  next()};
document.addEventListener('visibilitychange',()=>{if(!document.hidden)look()});
next()})()
""".replace("SECONDS", str(REFRESH))


def _allowed(content: str) -> str:
    return f"'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'"


#: The page may run and look like this, ask its own listener, and nothing else.
POLICY = (
    f"default-src 'none'; style-src {_allowed(STYLE)}; script-src {_allowed(SCRIPT)}; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
