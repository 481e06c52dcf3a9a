"""The texts that the chat set is made of; all written for it."""

# ruff: noqa: E501

from __future__ import annotations

CONCEPTS = {
    "photosynthesis": "Plants use sunlight to turn water and carbon dioxide into sugar and oxygen. The green pigment chlorophyll catches the light, and the sugar feeds the plant's growth.",
    "inflation": "Inflation is a general rise in prices over time, so the same money buys less. Central banks usually fight it by raising interest rates, which cools spending.",
    "a black hole": "A black hole is a region where gravity is so strong that not even light escapes. Most form when a massive star runs out of fuel and its core collapses.",
    "machine learning": "Machine learning lets a program improve from examples instead of fixed rules. You show it data, measure its mistakes, and adjust its parameters until the mistakes shrink.",
    "a virus": "A virus is a packet of genetic material in a protein shell. It cannot multiply on its own: it enters a cell and makes the cell copy it.",
    "the water cycle": "Water evaporates from seas and lakes, cools into clouds, and falls as rain or snow. Rivers and groundwater carry it back, and the cycle starts again.",
    "a transistor": "A transistor is a tiny electronic switch: a small voltage on one contact controls the current between two others. Billions of them make up a processor.",
    "compound interest": "With compound interest you earn interest on your interest. 1,000 euros at 5 percent become 1,050 after one year and 1,102.50 after two, and the growth speeds up from there.",
    "plate tectonics": "The Earth's crust is broken into plates that drift a few centimetres a year. Where they meet, mountains rise, trenches open, and earthquakes and volcanoes are common.",
    "an algorithm": "An algorithm is a list of exact steps that solves a problem. A recipe is one, and so is long division; computers just follow theirs very quickly.",
    "supply and demand": "When people want more of something than is offered, its price rises until the two balance. If more is offered than wanted, the price falls.",
    "a vaccine": "A vaccine shows the immune system a harmless part of a germ. The body learns to recognise it, so the real germ is met by a prepared defence.",
    "gravity": "Gravity is the attraction between masses. It keeps your feet on the ground, the Moon around the Earth, and it weakens with the square of the distance.",
    "encryption": "Encryption scrambles a message so that only someone with the right key can read it. Anyone else sees what looks like random noise.",
    "a neural network": "A neural network is a stack of layers that multiply their inputs by learned weights and pass them through simple functions. Together the layers can approximate very complicated relations.",
    "the placebo effect": "The placebo effect is a real improvement that comes from expecting a treatment to work. That is why new medicines are compared with a pill that contains nothing.",
    "entropy": "Entropy measures how many ways a system can be arranged without looking different. Left alone, things tend towards states with more such arrangements: coffee cools, rooms get messy.",
    "a database index": "An index is a sorted copy of a column with pointers to the rows. Like the index of a book it makes looking things up fast, at the price of extra space and slower writes.",
    "jet lag": "Jet lag appears when your inner clock still follows the time zone you left. Daylight in the morning, meals at local times and a little patience bring it back in step.",
    "the greenhouse effect": "Some gases let sunlight through but hold back the heat that the ground radiates. Without them the Earth would freeze; too much of them and it warms.",
    "a blockchain": "A blockchain is a shared list of records in which each block contains a fingerprint of the one before. Changing an old record would break every fingerprint after it.",
    "osmosis": "In osmosis water moves through a membrane towards the side with more dissolved salt or sugar. That is how roots take up water and why salted cucumbers get limp.",
    "a recession": "A recession is a longer period in which an economy shrinks. Firms sell less, invest less and hire less, and each of these makes the others worse.",
    "DNA": "DNA is the long molecule that stores the building plan of a living thing. Its four letters spell genes, and cells read them to make proteins.",
    "the speed of sound": "Sound travels at about 343 metres per second in air at room temperature. Count the seconds between lightning and thunder and divide by three for the distance in kilometres.",
    "a compiler": "A compiler translates a program from a language people write into instructions a processor runs. On the way it checks for mistakes and makes the code faster.",
    "habit formation": "A habit forms when the same cue is followed by the same action and a small reward. Start tiny, tie it to something you already do, and repeat it daily.",
    "latency": "Latency is the time you wait for the first response, and throughput is how much arrives per second. A lorry full of disks has great throughput and terrible latency.",
    "an eclipse": "In a solar eclipse the Moon passes between the Sun and us and casts its shadow on the Earth. In a lunar eclipse the Earth's shadow falls on the Moon.",
    "democracy": "In a democracy people choose those who govern them in free elections, and can choose others next time. Courts, a free press and minority rights keep the winners in check.",
}  # fmt: skip

ASKS = (
    "What is {}?", "Explain {} in two or three sentences.", "Can you tell me briefly what {} means?",
    "I keep hearing about {}. What is it?", "Give me a simple explanation of {}, please.",
)  # fmt: skip

COUNTRIES = (
    ("Japan", "Tokyo", "Asia", "yen", "Japanese"), ("Brazil", "Brasília", "South America", "real", "Portuguese"),
    ("Kenya", "Nairobi", "Africa", "Kenyan shilling", "Swahili and English"),
    ("Canada", "Ottawa", "North America", "Canadian dollar", "English and French"),
    ("Norway", "Oslo", "Europe", "Norwegian krone", "Norwegian"), ("Egypt", "Cairo", "Africa", "Egyptian pound", "Arabic"),
    ("India", "New Delhi", "Asia", "Indian rupee", "Hindi and English"),
    ("Australia", "Canberra", "Oceania", "Australian dollar", "English"),
    ("Turkey", "Ankara", "Asia and Europe", "lira", "Turkish"), ("Peru", "Lima", "South America", "sol", "Spanish"),
    ("Poland", "Warsaw", "Europe", "złoty", "Polish"), ("Vietnam", "Hanoi", "Asia", "dong", "Vietnamese"),
    ("Switzerland", "Bern", "Europe", "Swiss franc", "German, French, Italian and Romansh"),
    ("South Korea", "Seoul", "Asia", "won", "Korean"), ("Mexico", "Mexico City", "North America", "peso", "Spanish"),
)  # fmt: skip

PHRASES = (
    ("Good morning, how are you?", "Bonjour, comment allez-vous ?", "Buenos días, ¿cómo está?", "Guten Morgen, wie geht es Ihnen?"),
    ("Where is the train station?", "Où est la gare ?", "¿Dónde está la estación de tren?", "Wo ist der Bahnhof?"),
    ("I would like a coffee, please.", "Je voudrais un café, s'il vous plaît.", "Quisiera un café, por favor.", "Ich hätte gerne einen Kaffee, bitte."),
    ("How much does this cost?", "Combien ça coûte ?", "¿Cuánto cuesta esto?", "Wie viel kostet das?"),
    ("I do not understand.", "Je ne comprends pas.", "No entiendo.", "Ich verstehe nicht."),
    ("The weather is beautiful today.", "Il fait beau aujourd'hui.", "Hoy hace buen tiempo.", "Das Wetter ist heute schön."),
    ("Can you help me?", "Pouvez-vous m'aider ?", "¿Puede ayudarme?", "Können Sie mir helfen?"),
    ("We will arrive tomorrow evening.", "Nous arriverons demain soir.", "Llegaremos mañana por la noche.", "Wir kommen morgen Abend an."),
)  # fmt: skip
LANGUAGES = ("French", "Spanish", "German")

RECIPES = {
    "tomato soup": ("1 onion, 2 cloves of garlic, 800 g tomatoes, 300 ml stock", ("Soften the chopped onion and garlic in oil.", "Add tomatoes and stock and simmer for 20 minutes.", "Blend until smooth and season with salt and basil.")),
    "pancakes": ("200 g flour, 2 eggs, 300 ml milk, a pinch of salt", ("Whisk everything into a smooth batter.", "Let it rest for 15 minutes.", "Fry thin rounds in butter, about a minute a side.")),
    "fried rice": ("300 g cooked rice, 2 eggs, 100 g peas, 1 carrot, soy sauce", ("Scramble the eggs and set them aside.", "Stir-fry the diced carrot and the peas.", "Add the rice, then the eggs and soy sauce, and toss over high heat.")),
    "guacamole": ("2 ripe avocados, half a lime, 1 tomato, coriander, salt", ("Mash the avocados with the lime juice.", "Fold in the diced tomato and chopped coriander.", "Salt to taste and serve at once.")),
    "lentil stew": ("250 g red lentils, 1 onion, 2 carrots, 1 l stock, cumin", ("Fry the onion, carrots and cumin for five minutes.", "Add lentils and stock.", "Cook gently for 25 minutes, until it is thick.")),
    "banana bread": ("3 ripe bananas, 200 g flour, 100 g sugar, 80 g butter, 1 egg, baking powder", ("Mash the bananas and stir in melted butter, sugar and egg.", "Mix in the flour and baking powder.", "Bake in a tin at 175 degrees for about 55 minutes.")),
}  # fmt: skip

MAILS = (
    ("my landlord", "the heating in my flat has not worked since Monday", "Could you please send someone to repair it this week?"),
    ("a colleague", "I cannot join the planning meeting on Thursday", "Could you share the notes with me afterwards?"),
    ("a customer", "their order will arrive two days late", "We are sorry for the delay and have refunded the shipping."),
    ("my manager", "I would like to take the last week of August off", "Anna has agreed to cover for me during that time."),
    ("a supplier", "three of the boxes we received were damaged", "Please tell us whether you prefer to replace or refund them."),
    ("a teacher", "my daughter is ill and will miss school today", "Could you let us know what she should catch up on?"),
    ("a conference organiser", "I am happy to accept the invitation to speak", "Could you confirm the length of the talk and the room?"),
    ("my neighbour", "we are having a small party on Saturday night", "If it ever gets too loud, please just knock."),
)  # fmt: skip
TONES = ("polite", "short", "friendly", "formal")

CODE = (
    ("Write a Python function that checks whether a word is a palindrome.", 'def is_palindrome(word: str) -> bool:\n    letters = [c.lower() for c in word if c.isalnum()]\n    return letters == letters[::-1]', "It ignores case and everything that is no letter or digit."),
    ("How do I count how often each word occurs in a text file in Python?", 'from collections import Counter\n\nwith open("text.txt", encoding="utf-8") as file:\n    counts = Counter(file.read().lower().split())\nprint(counts.most_common(10))', "`Counter` does the counting, and `most_common` sorts."),
    ("Write a function that returns the n-th Fibonacci number without recursion.", "def fibonacci(n: int) -> int:\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a", "Each step moves the pair of neighbours one further, so it takes n additions."),
    ("Show me a SQL query for the five customers with the highest total orders.", "SELECT customer_id, SUM(amount) AS total\nFROM orders\nGROUP BY customer_id\nORDER BY total DESC\nLIMIT 5;", "Add a JOIN with the customers table if you need their names."),
    ("How can I find all files larger than 100 MB on Linux?", "find . -type f -size +100M -exec ls -lh {} +", "Start it in the directory you want to search."),
    ("Write a C function that swaps two integers.", "void swap(int *a, int *b) {\n    int t = *a;\n    *a = *b;\n    *b = t;\n}", "Call it with addresses: `swap(&x, &y);`."),
    ("How do I read a JSON file in JavaScript with Node?", 'import { readFile } from "node:fs/promises";\n\nconst data = JSON.parse(await readFile("data.json", "utf8"));\nconsole.log(data);', "The top-level `await` needs an ES module."),
    ("Write a bash loop that renames all .jpeg files to .jpg.", 'for f in *.jpeg; do\n  mv -- "$f" "${f%.jpeg}.jpg"\ndone', "`${f%.jpeg}` cuts the ending off."),
    ("Give me a Python class for a simple stack.", "class Stack:\n    def __init__(self):\n        self._items = []\n\n    def push(self, item):\n        self._items.append(item)\n\n    def pop(self):\n        return self._items.pop()\n\n    def __len__(self):\n        return len(self._items)", "Popping from an empty stack raises IndexError."),
    ("How do I reverse a linked list?", "def reverse(head):\n    previous = None\n    while head:\n        head.next, previous, head = previous, head, head.next\n    return previous", "Each node is made to point to the one before it; this takes linear time and no extra memory."),
)  # fmt: skip

REWRITES = (
    ("The meeting which was planned for Tuesday has, due to the fact that many people are ill, been moved to Friday.", "Many people are ill, so Tuesday's meeting moves to Friday."),
    ("hey, can u send me the file asap, i need it for the boss", "Could you please send me the file as soon as possible? I need it for my manager."),
    ("It is not impossible that we might perhaps be able to deliver earlier.", "We may be able to deliver earlier."),
    ("The results was better then we expected and the team are happy about it.", "The results were better than we expected, and the team is happy about it."),
    ("In order to make use of the device it is necessary that you first charge the battery.", "Charge the battery before you use the device."),
    ("Due to its size and its weight and also its price the camera is not a thing we want to recommend.", "We do not recommend the camera: it is too large, too heavy and too expensive."),
    ("Me and my brother has went to the museum yesterday.", "My brother and I went to the museum yesterday."),
    ("There are a number of issues that need to be addressed by the engineers before a launch can be considered.", "The engineers must solve several problems before we can launch."),
)  # fmt: skip

DEVICE = (
    ("Turn on the lights in the kitchen.", '{"action": "set_light", "room": "kitchen", "state": "on"}'),
    ("Set the living room to 21 degrees.", '{"action": "set_temperature", "room": "living room", "celsius": 21}'),
    ("Drive to the charging station.", '{"action": "navigate", "target": "charging_station"}'),
    ("Stop right now!", '{"action": "stop", "urgent": true}'),
    ("Remind me in ten minutes to check the oven.", '{"action": "set_timer", "minutes": 10, "label": "check the oven"}'),
    ("What is in front of the camera?", '{"action": "describe_image", "camera": "front"}'),
    ("Bring the red box to table four.", '{"action": "fetch", "object": "red box", "target": "table 4"}'),
    ("Play some quiet music in the bedroom.", '{"action": "play_music", "room": "bedroom", "mood": "quiet"}'),
    ("Close the blinds and lock the front door.", '[{"action": "close_blinds"}, {"action": "lock", "door": "front"}]'),
    ("How full is the battery?", '{"action": "report", "value": "battery_level"}'),
)  # fmt: skip

ADVICE = (
    ("How can I fall asleep faster?", "Keep the same bedtime every day, dim the lights an hour before, and leave the phone outside the bedroom. A cool, dark room helps. If you are awake after twenty minutes, get up, read something dull, and try again when you are tired."),
    ("What should I pack for a day hike?", "Take water, a snack, a rain jacket, sunscreen, a hat, a charged phone and a small first-aid kit. Wear shoes you have walked in before. Tell someone your route and when you plan to be back."),
    ("How do I prepare for a job interview?", "Read about the company and the role, and prepare three short stories about problems you solved. Think of two questions of your own. Check the way there, or your camera and microphone, the day before."),
    ("My houseplant has yellow leaves. What is wrong?", "Most often it gets too much water. Let the top two centimetres of soil dry before watering again, and check that the pot can drain. If only the lower leaves are yellow, it may want fertiliser or simply be shedding old leaves."),
    ("How can I save money on groceries?", "Plan the week's meals, write a list and stick to it. Buy staples in large packs and vegetables in season. Cook twice the amount and freeze half."),
    ("What is a good way to learn a language?", "Study a little every day rather than a lot on Sundays. Learn the thousand commonest words with spaced repetition, listen to easy podcasts, and speak with someone from the first month on, mistakes and all."),
    ("Should I buy or rent a flat?", "It depends on how long you will stay, what you can pay up front and how prices compare. Buying has large one-time costs, so it rarely pays for less than five to seven years. Renting keeps you flexible; work out both for your own numbers."),
    ("How do I back up my laptop?", "Keep three copies on two kinds of storage, one of them elsewhere. In practice: an external disk with automatic backups, plus a cloud service. Restore a file now and then, to be sure that it works."),
    ("Why does my phone get hot when charging?", "Part of the electrical energy becomes heat, more of it with fast charging or a thick case. That is normal up to hand-warm. Take the case off, charge out of the sun, and stop if it is too hot to hold."),
    ("How do I stay focused while working from home?", "Work at a fixed place and fixed hours, put the phone in another room, and plan the day's three most important tasks in the morning. Short breaks every hour help more than one long one."),
)  # fmt: skip
