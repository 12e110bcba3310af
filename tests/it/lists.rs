//! Lists as people write them.

use std::{fs, path::PathBuf};

use burn_moe::clip::lists::{CaptionedImages, Columns, ListError, lines_in};

fn read(name: &str, bytes: &[u8], columns: &Columns) -> Result<CaptionedImages, String> {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(name), bytes).unwrap();
    CaptionedImages::table(folder.path().join(name), columns)
        .map_err(|error| error.to_string().replace(&format!("{}/", folder.path().display()), ""))
}

fn two_images() -> CaptionedImages {
    let captions = [("a cat, \"on\" a mat", 0), ("a cat", 0), ("a dog", 1)].map(|(caption, image)| (caption.to_string(), image));
    CaptionedImages { images: ["a.jpg", "b.jpg"].map(PathBuf::from).to_vec(), captions: captions.to_vec() }
}

#[test]
fn tables_of_every_usual_form_are_read() {
    let usual = Columns::default();
    for (name, text) in [
        ("list.csv", "path,caption\na.jpg,\"a cat, \"\"on\"\" a mat\"\na.jpg,a cat\nb.jpg,a dog\n"),
        ("list.CSV", "Path, Caption\na.jpg, \"a cat, \"\"on\"\" a mat\"\n a.jpg , a cat\nb.jpg,a dog"),
        ("list.tsv", "filepath\ttitle\na.jpg\t\"a cat, \"\"on\"\" a mat\"\na.jpg\ta cat\nb.jpg\ta dog\n"),
        ("list.csv", "filepath\ttitle\na.jpg\t\"a cat, \"\"on\"\" a mat\"\na.jpg\ta cat\nb.jpg\ta dog\n"),
        ("list.csv", "id;image;text\n1;a.jpg;\"a cat, \"\"on\"\" a mat\"\n2;b.jpg;a dog\n3;a.jpg;a cat\n"),
        ("results.csv", "image_name| comment_number| comment\na.jpg| 0| a cat, \"on\" a mat\na.jpg| 1| a cat\nb.jpg| 0| a dog\n"),
        ("captions.txt", "image,caption\na.jpg,\"a cat, \"\"on\"\" a mat\"\na.jpg,a cat\nb.jpg,a dog\n"),
        (
            "list.jsonl",
            "{\"file_name\": \"a.jpg\", \"text\": \"a cat, \\\"on\\\" a mat\"}\n{\"file_name\": \"a.jpg\", \"text\": \"a cat\"}\n\n\
             {\"file_name\": \"b.jpg\", \"text\": \"a dog\", \"id\": 7}\n",
        ),
    ] {
        assert_eq!(read(name, text.as_bytes(), &usual).unwrap_or_else(|error| panic!("{text}: {error}")), two_images(), "{text}");
    }
    let own = Columns { image: Some("Photo".into()), caption: Some("alt".into()) };
    let found = read("list.csv", b"alt,caption,photo\na dog,x,b.jpg\n", &own).unwrap();
    assert_eq!(found.captions, [("a dog".to_string(), 0)]);
}

#[test]
fn what_is_wrong_in_a_table_is_named() {
    let error = |bytes: &[u8]| read("list.csv", bytes, &Columns::default()).unwrap_err();
    let text = error(b"photo,words\nb.jpg,a dog\n");
    assert!(text.starts_with("list.csv: the columns of its first line are `photo`, `words`; expected one of path, "), "{text}");
    assert_eq!(error(b"path,caption\nb.jpg,a \xe9\n"), "list.csv: line 2 is no UTF-8: save the file in this encoding");
    assert_eq!(error(b"path,caption\n,a dog\n"), "list.csv: line 2: no image");
    assert_eq!(error(b"path,caption\n"), "list.csv: no image with a caption");
    let text = read("x", b"{\"path\": \"a\"\n", &Columns::default()).unwrap_err();
    assert!(text.starts_with("x: line 1: not the JSON that was expected: "), "{text}");
}

/// A byte order mark, line ends of Windows, a last line without an end and blanks at the ends of lines change nothing, whichever file it is.
#[test]
fn how_an_editor_saved_a_list_changes_nothing() {
    type Reader = fn(PathBuf) -> Result<String, ListError>;
    fn debug<T: std::fmt::Debug>(value: T) -> String {
        format!("{value:?}")
    }
    let readers: [(&str, &str, Reader); 6] = [
        ("table", "path,caption\na.jpg,a cat\nb.jpg,a dog\n", |path| CaptionedImages::table(path, &Columns::default()).map(debug)),
        ("json lines", "{\"path\": \"a.jpg\", \"caption\": \"a cat\"}\n{\"path\": \"b.jpg\", \"caption\": \"a dog\"}\n", |path| {
            CaptionedImages::table(path, &Columns::default()).map(debug)
        }),
        (
            "coco",
            "{\"images\": [{\"id\": 1, \"file_name\": \"a.jpg\"}],\n\"annotations\": [{\"image_id\": 1, \"caption\": \"a cat\"}]}\n",
            |path| CaptionedImages::coco(path).map(debug),
        ),
        (
            "karpathy",
            "{\"images\":\n[{\"filename\": \"a.jpg\", \"split\": \"test\", \"sentences\": [{\"raw\": \"a cat\"}]}]}\n",
            |path| CaptionedImages::karpathy(path, "test").map(debug),
        ),
        ("flickr30k", "a.jpg#0\ta cat\nb.jpg#0\ta dog\n", |path| CaptionedImages::flickr30k(path).map(debug)),
        ("lines", "a cat\na dog\n", |path| lines_in(path).map(debug)),
    ];
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("list");
    for (name, text, reader) in readers {
        let run = |text: String| {
            fs::write(&path, text).unwrap();
            reader(path.clone()).unwrap_or_else(|error| panic!("{name}: {error}"))
        };
        let expected = run(text.to_string());
        for saved in [
            format!("\u{feff}{text}"),
            text.replace('\n', "\r\n"),
            text.trim_end().to_string(),
            text.replace('\n', "  \n"),
            format!("\u{feff}{}", text.trim_end().replace('\n', " \r\n")),
        ] {
            assert_eq!(run(saved.clone()), expected, "{name}: {saved:?}");
        }
    }
}
