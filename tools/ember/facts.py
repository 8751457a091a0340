"""What the built-in model knows: plain tables of true facts, read by ``kinds``.

Everything here is data. A fact is listed once; ``kinds`` asks about it in many ways, some of which are held
out of the training text.
"""

from __future__ import annotations

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip

ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth",
    "seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth",
)  # fmt: skip

NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
)  # fmt: skip

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "England": "London", "Scotland": "Edinburgh", "Wales": "Cardiff", "Ireland": "Dublin",
    "Iceland": "Reykjavik",
    "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen",
    "Poland": "Warsaw",
    "Austria": "Vienna", "Hungary": "Budapest", "Greece": "Athens", "Turkey": "Ankara", "Belgium": "Brussels",
    "Switzerland": "Bern", "Romania": "Bucharest", "Bulgaria": "Sofia", "Serbia": "Belgrade",
    "Croatia": "Zagreb",
    "Slovenia": "Ljubljana", "Slovakia": "Bratislava", "Ukraine": "Kyiv", "Estonia": "Tallinn",
    "Latvia": "Riga",
    "Lithuania": "Vilnius", "Albania": "Tirana", "Malta": "Valletta", "Cyprus": "Nicosia", "Russia": "Moscow",
    "the United States": "Washington", "Canada": "Ottawa", "Mexico": "Mexico City", "Cuba": "Havana",
    "Jamaica": "Kingston", "Brazil": "Brasilia", "Argentina": "Buenos Aires", "Chile": "Santiago",
    "Peru": "Lima",
    "Colombia": "Bogota", "Ecuador": "Quito", "Venezuela": "Caracas", "Uruguay": "Montevideo",
    "Paraguay": "Asuncion", "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi",
    "South Korea": "Seoul",
    "Thailand": "Bangkok", "Vietnam": "Hanoi", "Indonesia": "Jakarta", "Nepal": "Kathmandu",
    "Mongolia": "Ulaanbaatar",
    "the Philippines": "Manila", "Pakistan": "Islamabad", "Bangladesh": "Dhaka", "Iran": "Tehran",
    "Iraq": "Baghdad", "Saudi Arabia": "Riyadh", "Qatar": "Doha", "Lebanon": "Beirut", "Jordan": "Amman",
    "Egypt": "Cairo", "Morocco": "Rabat", "Tunisia": "Tunis", "Algeria": "Algiers", "Libya": "Tripoli",
    "Kenya": "Nairobi", "Ethiopia": "Addis Ababa", "Nigeria": "Abuja", "Ghana": "Accra", "Senegal": "Dakar",
    "Uganda": "Kampala", "Rwanda": "Kigali", "Angola": "Luanda", "Namibia": "Windhoek",
    "Australia": "Canberra",
    "New Zealand": "Wellington",
}  # fmt: skip

COLOURS = {
    "the sky": "Blue", "the sea": "Blue", "grass": "Green", "a leaf": "Green", "a frog": "Green",
    "a cucumber": "Green",
    "spinach": "Green", "broccoli": "Green", "an emerald": "Green", "a banana": "Yellow", "a lemon": "Yellow",
    "the sun": "Yellow", "butter": "Yellow", "a canary": "Yellow", "a sunflower": "Yellow", "snow": "White",
    "milk": "White", "salt": "White", "a swan": "White", "chalk": "White", "rice": "White", "coal": "Black",
    "the night": "Black", "a raven": "Black", "ink": "Black", "a tomato": "Red", "blood": "Red",
    "a strawberry": "Red",
    "a cherry": "Red", "a fire engine": "Red", "a ruby": "Red", "a ladybird": "Red", "a carrot": "Orange",
    "a pumpkin": "Orange", "an orange": "Orange", "an aubergine": "Purple", "a plum": "Purple",
    "lavender": "Purple",
    "a violet": "Purple", "chocolate": "Brown", "wood": "Brown", "coffee": "Brown", "a bear": "Brown",
    "soil": "Brown",
    "a flamingo": "Pink", "a pig": "Pink", "an elephant": "Grey", "ash": "Grey", "a rain cloud": "Grey",
    "a mouse": "Grey",
}  # fmt: skip

MIXES = {
    ("red", "yellow"): "Orange", ("blue", "yellow"): "Green", ("red", "blue"): "Purple",
    ("red", "white"): "Pink", ("black", "white"): "Grey", ("red", "green"): "Brown",
}  # fmt: skip

WORDS = tuple(
    """
    cat dog bird fish horse mouse sheep goat cow pig lion tiger bear wolf fox deer rabbit frog snake spider
    house home door window roof wall floor room kitchen table chair bed lamp clock book paper pencil letter
    word tree flower grass leaf root forest river lake sea ocean mountain valley hill island beach stone
    sand rain snow wind storm cloud sky sun moon star light flame fire water earth air ice summer winter
    spring autumn morning evening night day week month year hour minute apple pear plum cherry banana lemon
    orange grape bread butter cheese milk egg soup salt sugar honey coffee tea cake sweet sour warm cold hot
    cool big small long short tall deep high low fast slow old new young good bad happy sad brave calm kind
    clever quiet loud soft hard heavy bright dark clean dirty full empty open closed early late near far
    left right red blue green yellow white black brown purple pink grey one two three four five six seven
    eight nine ten mother father sister brother child friend teacher doctor farmer baker king queen garden
    street bridge road car train boat ship plane bicycle wheel engine motor hammer nail rope knife spoon
    fork plate bottle glass cup shoe shirt coat hat glove ring music song dance game ball story picture
    paint school lesson question answer number name world country city village market shop money gold silver
    iron wood cotton wool heart hand foot head eye ear nose mouth hair finger arm leg pilot worker model
    server memory token prompt request endpoint gateway cluster machine computer keyboard screen program
    python code data file folder key lock queue elephant monkey dolphin eagle butterfly tomato potato banana
    birthday people family holiday breakfast dinner travel hello goodbye please thanks welcome
    """.split()  # noqa: SIM905 - readable as text, not as four hundred quoted words
)

# Short words between the others; only repeated, never asked about.
SMALL_WORDS = tuple(
    """
    the a an is are was and or not of to in on at over under with from by for my your his her our this that it
    he she we they you I me very so too no yes all some many every always never jumps runs says goes likes
    lazy
    """.split()  # noqa: SIM905 - readable as text
)

NAMES = tuple(
    """
    Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Maria Nina Oscar Paula Robert Sara Thomas
    Ursula Victor Wendy Alice Bob Carol Daniel Eva Frank George Helen Ivan Julia Karl Laura Martin Nora Olaf
    Peter Rosa Simon Tina Adam Bella Colin Diana Erik Fiona Hugo Irene James Linda Marco Omar Priya Ravi
    Sofia Tom Yuki Zoe Lena
    """.split()  # noqa: SIM905 - readable as text
)

DEFINITIONS = {
    "Pilotlight": "Pilotlight turns machines you own into serverless endpoints for language models.",
    "a pilot light": "A pilot light is the small flame that lets the big burner start at once.",
    "Ember": "Ember is the small language model that is built into Pilotlight.",
    "vLLM": "vLLM is the engine that serves the language models in Pilotlight.",
    "an endpoint": "An endpoint is the address under which a deployed model answers requests.",
    "a worker": "A worker is one running engine with its devices, started when it is needed.",
    "the gateway": "The gateway takes the requests, checks the key and sends them to a worker.",
    "a cold start": "A cold start is the time from no worker at all to a worker that is ready.",
    "the idle timeout": "The idle timeout is how long a worker waits without requests before it is stopped.",
    "scale to zero": "Scale to zero means that an endpoint has no workers while nobody calls it.",
    "a job": "A job is one queued piece of work that a worker takes and answers.",
    "a revision": "A revision is one fixed version of the settings of an endpoint.",
    "the autoscaler": "The autoscaler decides how many workers an endpoint needs.",
    "FlashBoot": "FlashBoot keeps the last workers frozen so that they wake up very quickly.",
    "the queue": "The queue holds the requests that wait for a free worker.",
    "a token": "A token is a small piece of text that a language model reads or writes.",
    "the data folder": "The data folder is where Pilotlight keeps its database, its keys and its logs.",
    "an API key": "An API key is the secret that lets a client call an endpoint.",
}

COMMANDS = {
    "start Pilotlight": "pilotlight up",
    "deploy a model": "pilotlight deploy",
    "list the endpoints": "pilotlight ls",
    "list the workers": "pilotlight ps",
    "read the logs": "pilotlight logs",
    "chat with a model": "pilotlight chat",
    "run a job": "pilotlight run",
    "see the status of a job": "pilotlight status",
    "cancel a job": "pilotlight cancel",
    "delete an endpoint": "pilotlight rm",
    "create a key": "pilotlight keys create",
    "list the keys": "pilotlight keys ls",
    "try Pilotlight": "make run",
    "run the tests": "make test",
    "check the code": "make check",
    "run the benchmarks": "make bench",
}

IDENTITY = {
    "I am Ember, the small model that is built into Pilotlight.": (
        "Who are you?", "What are you?", "What is your name?", "Tell me who you are.", "Introduce yourself.",
        "Please introduce yourself.", "Who am I talking to?", "Which model are you?", "What model is this?",
        "What should I call you?", "Are you a person?", "Are you ChatGPT?", "Tell me about yourself.",
        "Do you have a name?", "Who is answering me?", "What kind of model are you?",
    ),
    "I have about four million parameters, so I know only a few simple things.": (
        "How big are you?", "How large are you?", "How many parameters do you have?", "What is your size?",
        "Are you a large language model?", "Are you a big model?", "How small are you?",
        "Are you a small model?",
    ),
    "I can do small sums, name days, months, colours and capitals, spell, count and repeat.": (
        "What can you do?", "What do you know?", "How can you help me?", "What can I ask you?", "Help me!",
        "Help!",
        "What are you good at?", "Which questions can you answer?", "What should I ask you?",
        "What are your skills?",
        "Tell me what you can do.", "What do you know about?",
    ),
    "I was trained by the script tools/train_ember.py of Pilotlight.": (
        "Who made you?", "Who trained you?", "Where do you come from?", "How were you made?",
        "Who created you?",
        "How were you trained?", "Who built you?", "Which script trained you?",
    ),
    "Pilotlight listens on port 8400 by default.": (
        "Which port does Pilotlight use?", "What is the default port of Pilotlight?",
        "On which port does Pilotlight listen?", "What port does Pilotlight listen on?",
        "Tell me the port of Pilotlight.", "Which port is the default port of Pilotlight?",
    ),
    "Pilotlight is free software under the Apache License 2.0.": (
        "What is the licence of Pilotlight?", "Which licence does Pilotlight have?",
        "Is Pilotlight free software?",
        "Is Pilotlight open source?", "What license does Pilotlight use?",
        "Under which licence is Pilotlight?",
        "Tell me the licence of Pilotlight.",
    ),
    "Pilotlight speaks the API of OpenAI and the serverless API of RunPod.": (
        "Which API does Pilotlight speak?", "Which APIs does Pilotlight speak?",
        "What API does Pilotlight have?",
        "Does Pilotlight speak the API of OpenAI?", "Can I use the OpenAI client with Pilotlight?",
        "Does Pilotlight work with the RunPod client?", "Which clients work with Pilotlight?",
        "Tell me which API Pilotlight speaks.",
    ),
    "No, Pilotlight also runs on a machine without a GPU.": (
        "Does Pilotlight need a GPU?", "Do I need a GPU for Pilotlight?",
        "Must I have a GPU to use Pilotlight?",
        "Is a GPU needed for Pilotlight?", "Is a GPU necessary to run Pilotlight?",
        "Do I need a graphics card for Pilotlight?",
    ),
}  # fmt: skip
