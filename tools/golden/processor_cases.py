"""The inputs of the golden fixtures of the tokenizer and the chat form."""

import itertools

VERSIONS = ["v3", "v7", "v11", "v13", "v15"]

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.", "HELLO World, iPhone McDonald's XMLHttpRequest getURLFor2ndTime",
    "Ünïcödé naïve façade Straße İstanbul ﬁ ǅ Ǆ", "Le cœur a ses raisons que la raison ne connaît point.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.", "El niño comió piña en la montaña ¿verdad?",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.", "Η γρήγορη καφέ αλεπού πηδά πάνω από το σκυλί.",
    "敏捷的棕色狐狸跳过了懒狗。数字：１２３４。", "いろはにほへと ちりぬるを カタカナ ｶﾀｶﾅ", "키스의 고유조건은 입술끼리 만나야 하고",
    "نص حكيم له سر قاطع وذو شأن عظيم", "דג סקרן שט בים מאוכזב ולפתע מצא חברה", "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า", "யாமறிந்த மொழிகளிலே தமிழ்மொழி போல்", "ქართული ენა", "Հայերեն լեզու", "አማርኛ ቋንቋ", "ᚠᚢᚦᚨᚱᚲ ᏣᎳᎩ 𐌰𐌱𐌲 𝔘𝔫𝔦",
    "e\u0301 a\u0308\u0304 n\u0303 \u0301alone Z\u0351\u036b\u0343a\u0363\u0369lgo", "नि्‌ क्‍ष ﷽ \u200b\u200c\u200d\ufeff",
    "😀😃🤣 👩‍👩‍👧‍👦 👍🏽 🇫🇷🇩🇪 ❤️‍🔥 🏴‍☠️ ☺☹", "0 1 12 123 1234567890 3.14159 -2e10 1,000,000 ½ ² Ⅷ ٣ ৪",
    "[INST] [/INST] <s> </s> [IMG] [TOOL_CALLS] [THINK]x[/THINK] <SPECIAL_31> <pad>", "[INST][INST]]/INST] < s> [ INST ]",
    "[MODEL_SETTINGS]{\"reasoning_effort\": \"high\"}[/MODEL_SETTINGS]", "<|im_start|>user<|endoftext|>",
    "def f(x: int) -> str:\n    return f\"{x!r:>{width}}\"  # comment\n\n\nclass A(B, metaclass=M):\n\tpass\n",
    "fn main() { let v: Vec<_> = (0..10).map(|x| x * 2).collect(); println!(\"{v:?}\"); }",
    "<div class=\"a b\" onclick='f(&quot;x&quot;)'>text<!-- c --></div>\r\n", "SELECT * FROM t WHERE a <> 'b''c' AND d >= 1e-3; -- x",
    "{\"a\": [1, 2.5, null, true], \"b\": {\"c\": \"d\\n\"}}", "https://example.org/path/to/file.html?q=a+b&c=%20d#frag//x",
    "a@b.co, (555) 123-4567; $1.99 €2 £3 ¥4 #tag @user ~/.bashrc C:\\Windows\\x.exe /usr/bin/env", "it's I'll we've they'd 'quoted' “curly” ‘single’ «guillemets» —dash– …",
    "\\begin{align} \\frac{a}{b} &= \\sum_{i=0}^{n} x_i^2 \\\\ \\end{align}", "# Title\n\n- item *bold* _it_ `code`\n\n```py\nx = 1\n```\n\n| a | b |\n|---|---|\n",
]
SPACES = [
    "", " ", "  ", "   ", "\t", "\t\t ", "\n", "\n\n", "\r\n", "\r\n\r\n", "\r", " \n", "\n ", "  \n  \n   ", "\u00a0", "\u2003\u2003", "\u3000",
    "\u0085", "\u2028", "\x00", "\x1b[31m", "\x7f", "\u00ad", " \t \r\n \t", "/\n", "//\r\n/", "...\n\n",
]
UNITS = [("a", 5000), (" ", 3000), ("ab ", 4000), ("\n", 2000), ("é", 2500), ("😀", 1500), ("word 12 ", 3000), ("=", 4097), ("汉", 3000), ("\r\n \t", 999), ("x" * 37 + "\n", 300)]


def strings(generator):
    """2,000 and more (text, times) pairs."""
    found = [(text, 1) for text in SENTENCES + SPACES] + UNITS
    pool = SENTENCES + SPACES
    ranges = [(0x20, 0x7E), (0x20, 0x24F), (0x370, 0x5FF), (0x600, 0x6FF), (0x900, 0xDFF), (0x1E00, 0x20CF), (0x2100, 0x2BFF),
              (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xE0FF), (0xFB00, 0xFFFD), (0x10000, 0x1F9FF), (0, 0x1F)]

    def piece():
        kind = generator.randrange(6)
        if kind <= 1:
            sentence = generator.choice(pool)
            start = generator.randrange(len(sentence) + 1)
            return sentence[start:start + generator.randrange(1, 40)]
        if kind == 2:
            return generator.choice(SPACES) * generator.randrange(1, 4)
        if kind == 3:
            low, high = generator.choice(ranges)
            return "".join(chr(generator.randint(low, high)) for _ in range(generator.randrange(1, 9)))
        if kind == 4:
            return "".join(generator.choice("0123456789") for _ in range(generator.randrange(1, 12)))
        return "".join(generator.choice("aAbBzZ'.,;!?-_/\\ \n") for _ in range(generator.randrange(1, 20)))

    while len(found) < 2100:
        text = "".join(piece() for _ in range(generator.randrange(1, 7)))
        if not any(0xD800 <= ord(character) <= 0xDFFF for character in text):
            found.append((text, 1))
    return found


def user(content):
    return {"role": "user", "content": content}


def system(content):
    return {"role": "system", "content": content}


def assistant(content=None, calls=None, **more):
    message = {"role": "assistant", **more}
    if content is not None:
        message["content"] = content
    if calls is not None:
        message["tool_calls"] = calls
    return message


def result(content, call_id="abcdefghi", **more):
    return {"role": "tool", "content": content, "tool_call_id": call_id, **more}


def call(name="get_weather", arguments='{"city": "Paris"}', call_id="abcdefghi", **more):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}, **more}


def text(value):
    return {"type": "text", "text": value}


def thinking(value, **more):
    return {"type": "thinking", "thinking": value, **more}


def tool(name="get_weather", parameters=None, **more):
    function = {"name": name, **more}
    if parameters is not None:
        function["parameters"] = parameters
    return {"type": "function", "function": function}


IMAGE = {"type": "image"}
WEATHER = {"type": "object", "properties": {"city": {"type": "string", "description": "La ville, é ü 漢 \"q\""}, "days": {"type": "integer", "minimum": 1, "default": 1.0, "maximum": 1e3}}, "required": ["city"]}
DIALOG = [user("Hi"), assistant("Hello!"), user("And now?")]

# Requests alone; every one is tried with every version.
REQUESTS = [
    [user("Hello")], [system("Be brief.")], [system("Be brief."), user("Hello")], [user("")], [user("  spaces  ")], DIALOG,
    [system("A"), system("B"), user("C"), user("D"), assistant("E "), assistant(" F"), user("G")],
    [user("a"), system("b"), user("c")], [system("a"), assistant("b"), user("c")], [assistant("a"), user("b")], [user("a"), assistant("b"), user("c"), system("d")],
    [user([text("one"), text("two")]), assistant([text("three"), text("four")]), user([text(""), text("x"), text("")])],
    [user([text("")])], [user([])], [system(""), user("x")], [system([text("a"), text("b")]), user("x")], [user("a"), user([text("b"), text("c")]), user("d")],
    [user("[INST]not a token[/INST]</s>"), assistant("<s>[TOOL_CALLS][ARGS]{}"), user("[IMG]")],
    [user("Weather?"), assistant(calls=[call()]), result("sunny"), assistant("It is sunny."), user("Thanks")],
    [user("Weather?"), assistant(calls=[call()]), result('{"temp":21.50,"x":[1,2],"u":"\\u00e9"}')],
    [user("Weather?"), assistant(calls=[call(arguments={"city": "Paris", "é": "ü\n", "n": 1.0, "big": 12345678901234567890123})]), result("21")],
    [user("q"), assistant(calls=[call(arguments="not json")]), result("")], [user("q"), assistant(calls=[call(arguments="")]), result("1e5")],
    [user("q"), assistant(calls=[call(arguments=None)]), result("[NaN, -Infinity, 1e400, 1E-7, 0.1, -0]")], [user("q"), assistant(calls=[call(arguments='{"a":1,"b":2,"a":3}')]), result("null")],
    [user("q"), assistant(calls=[call(call_id="aaaaaaaaa"), call("f", "{}", "bbbbbbbbb")]), result("B", "bbbbbbbbb"), result("A", "aaaaaaaaa"), assistant("done"), user("next")],
    [user("q"), assistant(calls=[call(call_id="aaaaaaaaa")]), assistant(calls=[call("f", "{}", "bbbbbbbbb")]), result("B", "bbbbbbbbb"), result("A", "aaaaaaaaa")],
    [user("q"), assistant("text and", [call()]), result("x")], [user("q"), assistant("text and", []), user("x")], [user("q"), assistant(calls=[]), user("x")], [user("q"), assistant("")],
    [user("q"), assistant(""), user("r")], [user("q"), assistant(), user("r")], [user("q"), assistant("   "), user("r")],
    [user("q"), assistant([thinking("hm"), text("a")]), user("r")], [user("q"), assistant([thinking("hm", closed=False)]), user("r")], [user("q"), assistant([text("a "), thinking("b"), text("c ")]), user("r")],
    [user("q"), assistant([thinking("")]), user("r")], [user("q"), assistant("a", reasoning_content="think"), user("r")], [user("q"), assistant(reasoning="think"), user("r")],
    [user("q"), assistant([text("a")], reasoning_content="t", reasoning="t"), user("r")], [user("q"), assistant("a", reasoning_content="t", reasoning="u"), user("r")],
    [user("q"), assistant([thinking("x")], reasoning_content="t"), user("r")], [user("q"), assistant("a", reasoning_content=""), user("r")], [user("q"), assistant("a", reasoning_content=5), user("r")],
    [user("q"), assistant("a", [call()], reasoning_content="t"), result("r")], [user("q"), assistant([thinking("x", closed="yes")]), user("r")], [user("q"), assistant([thinking("x", closed="maybe")]), user("r")],
    [system([thinking("x"), text("y")]), user("q")], [user([thinking("x")])], [user("q"), assistant(calls=[call()]), result([thinking("x")])],
    [user("q"), assistant(calls=[call()]), result([text("a"), text("b")])], [user("q"), assistant(calls=[call()]), result([])],
    # Refused everywhere or in some versions.
    [], [assistant("a")], [result("a")], [user("a"), result("b")], [user("a"), assistant("b"), result("c")], [system("a"), result("b")], [user("a"), assistant(calls=[call()]), result("x"), system("s")],
    [user("a"), assistant("b"), system("c")], [user("a"), assistant("b")], [user("a"), assistant(calls=[call()])], [user("a"), assistant(calls=[call()]), user("b")], [user("a"), assistant(calls=[call()]), assistant("b"), user("c")],
    [user("a"), assistant(calls=[call()]), result("1"), result("2")], [user("a"), assistant(calls=[call(), call()]), result("1")], [user("a"), assistant(calls=[call(), call(call_id="jklmnopqr")]), result("1"), assistant("b"), user("c")],
    [user("a"), assistant(calls=[call()]), result("1", "zzzzzzzzz")], [user("a"), assistant(calls=[call(call_id="short")]), result("1", "short")], [user("a"), assistant(calls=[call(call_id="null")]), result("1", "null")],
    [user("a"), assistant(calls=[call(call_id="")]), result("1", "")], [user("a"), assistant(calls=[call(call_id="abc-efghi")]), result("1", "abc-efghi")], [user("a"), assistant(calls=[call(call_id="abcdefghi\n")]), result("1", "abcdefghi\n")],
    [user("a"), assistant(calls=[call("bad name")]), result("1")], [user("a"), assistant(calls=[call("n" * 64)]), result("1")], [user("a"), assistant(calls=[call("n" * 65)]), result("1")], [user("a"), assistant(calls=[call("")]), result("1")], [user("a"), assistant(calls=[call("name\n")]), result("1")],
    [user("a"), assistant(calls=[call()]), result("1", name="get_weather")], [user("a"), assistant(calls=[call()]), result("1", name="bad name!")], [user("a"), assistant(calls=[call()]), result("1", None)],
    [assistant(calls=[call()]), result("1")], [user("a"), assistant("x"), assistant(calls=[call()]), result("1")], [user("a"), assistant(calls=[call()]), result("1"), user("b"), assistant(calls=[call("g")]), result("2")],
    [{"role": "robot", "content": "x"}], [{"content": "x"}], [{"role": "developer", "content": "x"}, user("y")], [{"role": "user"}], [user(None)], [user(5)], [user({"a": 1})], [user(["x"])], [user([{"text": "x"}])], [user([{"type": "video"}])],
    [user([{"type": "text"}])], [user([{"type": "text", "text": 1}])], [system(None), user("x")], [user("a"), {"role": "tool", "content": "x"}], [user("a"), assistant(calls="x"), user("b")], [user("a"), assistant(calls=[{"id": "abcdefghi"}]), user("b")],
    [user("a"), assistant(calls=[{"id": "abcdefghi", "function": {"name": "f"}}]), user("b")], [user("a"), assistant(calls=[{"function": {"name": "f", "arguments": "{}"}}]), result("x")], [user("a"), assistant(calls=[call(arguments=[1])]), user("b")],
    [user("a"), assistant(calls=[{"id": "abcdefghi", "type": "other", "function": {"name": "f", "arguments": "{}"}}]), user("b")], [user("a"), assistant(5), user("b")], [user("a"), assistant(calls=[call(call_id=None)]), user("b")],
    # Objects.
    {"messages": DIALOG}, {"messages": DIALOG, "reasoning_effort": "none"}, {"messages": DIALOG, "reasoning_effort": "high"}, {"messages": DIALOG, "reasoning_effort": "low"}, {"messages": DIALOG, "reasoning_effort": "huge"}, {"messages": DIALOG, "reasoning_effort": None}, {"messages": DIALOG, "reasoning_effort": 1},
    {"messages": DIALOG, "tools": []}, {"messages": DIALOG, "tools": None}, {"messages": DIALOG, "tools": [tool(parameters=WEATHER, description="Wetter für eine Stadt")]}, {"messages": [system("s"), *DIALOG], "tools": [tool(parameters=WEATHER), tool("f", {}, strict=True)], "reasoning_effort": "high"},
    {"messages": DIALOG, "tools": [tool()]}, {"messages": DIALOG, "tools": [tool(parameters=None, description=None)]}, {"messages": [system("only")], "tools": [tool()], "reasoning_effort": "high"}, {"messages": DIALOG, "tools": [{"function": {"name": "f"}}]},
    {"messages": DIALOG, "tools": [tool(parameters={"type": "object", "a": [1, 1.0, 1e22, 1e-5, True, None, {"b": {}}], "é": "\u2028\u007f\u0001"})]},
    {"messages": DIALOG, "tools": [tool("bad name")]}, {"messages": DIALOG, "tools": [{"type": "function"}]}, {"messages": DIALOG, "tools": [{"type": "x", "function": {"name": "f"}}]}, {"messages": DIALOG, "tools": [tool(parameters=[1])]}, {"messages": DIALOG, "tools": [{"type": "function", "function": {}}]},
    *[{"messages": [user("x")], "tools": [tool(parameters=bad)]} for bad in (
        {"type": "strange"}, {"type": 5}, {"type": ["string", "string"]}, {"type": []}, {"type": ["string", "null"]}, {"properties": []}, {"properties": {"a": 1}}, {"properties": {"a": True}}, {"required": "a"}, {"required": ["a", "a"]}, {"required": [1]}, {"required": []},
        {"minimum": "1"}, {"minimum": True}, {"multipleOf": 0}, {"multipleOf": 0.5}, {"maxLength": -1}, {"maxLength": 1.5}, {"maxLength": 2.0}, {"minItems": "x"}, {"enum": "a"}, {"enum": []}, {"items": [{}, 1]}, {"items": []}, {"items": {"type": "nope"}}, {"items": False},
        {"anyOf": []}, {"anyOf": [{"type": "string"}]}, {"allOf": {}}, {"not": 1}, {"if": "x"}, {"pattern": "["}, {"pattern": "^a+$"}, {"pattern": 1}, {"patternProperties": {"(": {}}}, {"patternProperties": {"^x": {"type": "string"}}}, {"additionalProperties": "no"}, {"additionalProperties": False},
        {"dependencies": {"a": ["b"]}}, {"dependencies": {"a": ["b", "b"]}}, {"dependencies": {"a": {"type": "bad"}}}, {"definitions": {"a": {"type": "bad"}}}, {"title": 1}, {"description": None}, {"format": "uri"}, {"format": 1}, {"$ref": "#/definitions/x"}, {"$ref": 1}, {"uniqueItems": "yes"}, {"const": 1}, {"examples": 1}, {"default": {"type": "bad"}}, {"unknown": {"type": "bad"}},
        {"pattern": "(?<n>a)"}, {"pattern": "(?P<n>a)(?P=n)"}, {"pattern": "\\p{L}"}, {"pattern": "a**"}, {"pattern": "*a"}, {"pattern": "a{2,1}"}, {"pattern": "a{,3}"}, {"pattern": "(?<=a+)b"}, {"pattern": "(?<=ab|cd)e"}, {"pattern": "[z-a]"}, {"pattern": "\\1"}, {"pattern": "(a)\\1"}, {"pattern": "a++b"}, {"pattern": "(?>a)b"}, {"pattern": "a)"}, {"pattern": "x(?i)y"}, {"pattern": "(?i)y"}, {"pattern": "\\u00e9\\x41\\d\\Z"}, {"pattern": "\\u00g9"}, {"pattern": "\\z"}, {"pattern": "[[:alpha:]]"}, {"pattern": "[\\w-z]"}, {"pattern": "(?#c)a|"}, {"pattern": "a{"}, {"pattern": "(?i-s:a)"}, {"pattern": "\\"},
    )],
    {"messages": [user("a"), assistant("Once upon")], "continue_final_message": True}, {"messages": [user("a"), assistant("Once upon ", [call()])], "continue_final_message": True}, {"messages": [user("a"), assistant([thinking("x", closed=False)])], "continue_final_message": True}, {"messages": [user("a")], "continue_final_message": True},
    {"messages": [user("a"), assistant("b")], "continue_final_message": False}, {"messages": [user("a"), assistant("b"), assistant("c")], "continue_final_message": True}, {"messages": [], "continue_final_message": True}, {"messages": [user("a"), assistant("")], "continue_final_message": True}, {"messages": [assistant("b")], "continue_final_message": True},
    {"messages": "x"}, {"messages": DIALOG, "temperature": 0.5, "stream": True, "unknown": 1},
]

# (request, sizes of its bare images as width, height)
WITH_IMAGES = [
    ([user([IMAGE])], [(40, 30)]), ([user([text("What?"), IMAGE])], [(100, 60)]), ([user([IMAGE, text("What?")])], [(28, 28)]), ([user([text("a"), text("b"), IMAGE])], [(29, 28)]), ([user([text("a"), IMAGE, text("b"), IMAGE])], [(28, 57), (56, 20)]),
    ([user([IMAGE, IMAGE])], [(10, 10), (90, 10)]), ([user("a"), user([IMAGE]), user([text("b"), IMAGE])], [(50, 50), (60, 30)]), ([system("s"), user([text("x"), IMAGE]), assistant("y"), user([text("z"), IMAGE])], [(70, 20), (20, 70)]),
    ([user([text("a"), IMAGE]), user("b")], [(33, 44)]), ([user([text(""), IMAGE])], [(33, 44)]), ([system([IMAGE]), user("x")], [(9, 9)]), ([user("x"), assistant([IMAGE]), user("y")], [(9, 9)]), ([user([IMAGE]), assistant("b")], [(9, 9)]),
    ([user("q"), assistant(calls=[call()]), result([IMAGE])], [(30, 30)]), ([user("q"), assistant(calls=[call()]), result([text("a"), IMAGE])], [(30, 60)]),
    ([user([IMAGE]), assistant(calls=[call(call_id="aaaaaaaaa"), call("f", "{}", "bbbbbbbbb")]), result([text("B"), IMAGE], "bbbbbbbbb"), result([IMAGE, text("A")], "aaaaaaaaa")], [(30, 30), (60, 30), (90, 30)]),
    ([user([IMAGE])], [(1541, 10)]), ([user([IMAGE])], [(3, 1600)]), ([user([IMAGE])], [(2000, 30)]), ([user([IMAGE])], [(1, 1)]),
]


def random_conversation(generator):
    """A conversation that mostly follows the rules."""
    def words():
        return generator.choice(SENTENCES + ["ok", "x y", " lead", "trail ", "a\n\nb", "[INST]"])

    def content(images, think):
        if generator.random() < 0.5:
            return words()
        parts = []
        for _ in range(generator.randrange(1, 4)):
            kind = generator.random()
            if images is not None and kind < 0.35:
                images.append((generator.randrange(1, 90), generator.randrange(1, 90)))
                parts.append(IMAGE)
            elif think and kind < 0.35:
                parts.append(thinking(words(), **({"closed": False} if generator.random() < 0.2 else {})))
            else:
                parts.append(text(words()))
        return parts

    images, messages = [], []
    for _ in range(generator.choice([0, 1, 1, 2])):
        messages.append(system(content(None, generator.random() < 0.05)))
    identifiers = itertools.count()
    for _ in range(generator.randrange(1, 4)):
        for _ in range(generator.choice([1, 1, 1, 2])):
            messages.append(user(content(images if generator.random() < 0.5 else None, False)))
        if generator.random() < 0.4:
            calls = [call(generator.choice(["f", "get_weather", "a-b_c"]), generator.choice(['{"a": 1}', '{"é":[1.50,"x"]}', "{}", "oops", {"k": "v"}]), f"call{next(identifiers):05d}") for _ in range(generator.randrange(1, 4))]
            messages.append(assistant(None if generator.random() < 0.7 else words(), calls))
            answers = [entry["id"] for entry in calls]
            generator.shuffle(answers)
            if generator.random() < 0.05:
                answers.pop()
            for answer in answers:
                messages.append(result(content(images if generator.random() < 0.1 else None, False), answer))
        message = assistant(content(None, generator.random() < 0.4))
        if generator.random() < 0.15 and isinstance(message["content"], str):
            message["reasoning_content"] = words()
        messages.append(message)
    if generator.random() < 0.85:
        messages.append(user(content(images, False)))
    body = {"messages": messages}
    if generator.random() < 0.4:
        body["tools"] = [tool(generator.choice(["f", "get_weather"]), WEATHER, description=words()) for _ in range(generator.randrange(1, 3))]
    if generator.random() < 0.2:
        body["reasoning_effort"] = generator.choice(["none", "high", "high", "medium"])
    return body, images


def conversations(generator):
    """Dictionaries with request, images, mode and the versions to try."""
    for request in REQUESTS:
        yield {"request": request, "images": [], "mode": "test", "versions": VERSIONS}
    for request, images in WITH_IMAGES:
        yield {"request": request, "images": images, "mode": "test", "versions": VERSIONS}
    for request in [DIALOG, [user("a"), assistant("b")], [user("a"), assistant(calls=[call()])], [user("a"), assistant(calls=[call(call_id="null")])], [user("a"), assistant(calls=[call(call_id="null")]), result("x", "null"), assistant("b")], [user("a")], [assistant("a")], [user("a"), assistant(calls=[call()]), result("1"), assistant("b")], [user("a"), assistant(calls=[call()]), result("1"), result("2", "bbbbbbbbb"), assistant("b")]]:
        yield {"request": request, "images": [], "mode": "finetuning", "versions": VERSIONS}
    for _ in range(400):
        request, images = random_conversation(generator)
        mode = "finetuning" if generator.random() < 0.2 else "test"
        yield {"request": request, "images": images, "mode": mode, "versions": [generator.choice(["v7", "v11", "v13", "v15", "v15", "v3"])]}
